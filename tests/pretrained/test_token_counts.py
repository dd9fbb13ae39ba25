"""Visual tokens of images by system, against published numbers and the formulas of papers."""

import pytest

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known import known_configs
from vlm_jax.pretrained.token_counts import SIZES, count_all, count_tokens, markdown

from ..advice import tried
from ..contracts import releases

# (height, width), tokens. Of a grid of tiles there are those of the whole image besides.
PUBLISHED = [
    ("llava-hf/llava-1.5-7b-hf", (720, 1280), 576),  # Liu et al. 2023: 24 x 24
    ("mtgv/MobileVLM_V2-1.7B", (720, 1280), 144),  # Chu et al. 2024, table 1
    ("Qwen/Qwen-VL", (720, 1280), 256),  # Bai et al. 2023, section 2.1
    ("deepseek-ai/deepseek-vl-7b-base", (720, 1280), 576),  # Lu et al. 2024, section 3.1
    ("llava-hf/llava-v1.6-mistral-7b-hf", (1024, 1024), 576 + 48 * 48 + 48),  # the blog's 2,880, and newlines
    ("OpenGVLab/InternVL3-8B", (480, 640), (12 + 1) * 256),  # Chen et al. 2024 (1.5), section 3.3: 3,328 of 12 tiles
    ("HuggingFaceM4/Idefics3-8B-Llama3", (1456, 1456), (16 + 1) * 169),  # Laurencon et al. 2024, section 3
    ("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", (2048, 2048), (16 + 1) * 64),
    ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", (1536, 1536), (16 + 1) * 81),
    # Wu et al. 2024, section 3.1: h (w + 1) of the tiles, 14 (14 + 1) of the whole, and a separator.
    ("deepseek-ai/deepseek-vl2", (720, 1280), 14 * 2 * (14 * 4 + 1) + 1 + 14 * 15),
    # Wei et al. 2025, table 1: Base has 256, and Gundam 100 a tile; newlines and the separator besides.
    ("deepseek-ai/DeepSeek-OCR", (640, 640), 256 + 16 + 1),
    ("deepseek-ai/DeepSeek-OCR", (720, 1280), 256 + 16 + 1 + 2 * 100 + 10),
    # transformers, test_processing_deepseek_ocr2.py.
    ("deepseek-ai/DeepSeek-OCR-2", (300, 200), 257),
    ("deepseek-ai/DeepSeek-OCR-2", (3264, 2448), 1121),
    # Wang et al. 2024 (Qwen2-VL), section 2.1: 224 x 224 has 66 tokens with the two tags around it.
    ("Qwen/Qwen2-VL-7B-Instruct", (224, 224), 66 - 2),
    ("Qwen/Qwen2.5-VL-7B-Instruct", (728, 1288), 26 * 46),
    ("Qwen/Qwen3-VL-8B-Instruct", (736, 1280), 23 * 40),
    ("lmms-lab/LLaVA-OneVision-1.5-4B-Instruct", (1600, 1600), 57 * 57),
    ("google/gemma-3-4b-it", (720, 1280), 256),  # Gemma Team 2025, section 2.1
    # Beyer et al. 2024, section 3.2: 256, 1024 and 4096 tokens.
    ("google/paligemma-3b-pt-224", (720, 1280), 256),
    ("google/paligemma-3b-pt-448", (720, 1280), 1024),
    ("google/paligemma2-3b-pt-896", (720, 1280), 4096),
    ("google/gemma-4-31B-it", (672, 960), 14 * 20),  # the README: 280 a picture, unless told
    # Li et al. 2024, section 3.2: 729 a tile, of at most 9 besides the whole; newlines besides.
    ("llava-hf/llava-onevision-qwen2-7b-ov-hf", (1152, 1152), 729 + 81 * 81 + 81),
    ("AIDC-AI/Ovis2-8B", (448, 448), 256 + 3),  # one tile, its start, the end of a row, and the end
    ("AIDC-AI/Ovis2.5-9B", (448, 448), 14 * 14 + 2),
]


@pytest.mark.parametrize(("release", "size", "tokens"), PUBLISHED)
def test_an_image_takes_the_published_number(release, size, tokens):
    assert count_tokens(release, [size]) == (tokens,)


def test_every_included_system_is_in_the_table():
    rows = count_all()
    told = [name for releases, _ in rows for name in releases]
    assert {name for name, _, _ in PUBLISHED} <= set(told) < set(known_configs()) and len(told) == len(set(told))
    lines = markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2 and {line.count("|") for line in lines} == {len(SIZES) + 2}


def test_a_budget_is_met_by_the_image_or_not_at_all():
    sizes = [(224, 224), (1080, 1920)]
    assert count_tokens("Qwen/Qwen2.5-VL-7B-Instruct", sizes, 576) == (64, 32 * 18)
    assert count_tokens("OpenGVLab/InternVL3-8B", sizes, 576) == (256, 256)
    assert count_tokens("llava-hf/llava-v1.6-mistral-7b-hf", sizes, 576) == (None, None)
    # Modes are named by their tokens, as in Wei et al. 2025, table 1; newlines and the separator come in addition.
    assert count_tokens("deepseek-ai/DeepSeek-OCR", sizes, 64) == (64 + 8 + 1,) * 2
    assert count_tokens("deepseek-ai/DeepSeek-OCR", sizes, 100) == (100 + 10 + 1,) * 2
    assert count_tokens("deepseek-ai/DeepSeek-OCR", sizes, 63) == (None, None)
    # The release's own numbers may be more than it takes untold; others are bounds.
    for budget, taken in ((70, 66), (140, 120), (280, 264), (560, 527), (1120, 1100), (600, 264), (100, 91)):
        assert count_tokens("google/gemma-4-31B-it", [(720, 1280)], budget) == (taken,)
    assert count_tokens("deepseek-ai/DeepSeek-OCR-2", sizes, 144) == (144 + 1,) * 2
    assert count_tokens("deepseek-ai/DeepSeek-OCR-2", sizes, 143) == (None, None)
    assert "| - |" in markdown(count_all(["llava-hf/llava-v1.6-mistral-7b-hf"], sizes, 576), sizes)


def test_a_folder_takes_what_its_processor_gives(tmp_path):
    (tmp_path / "release").mkdir()
    vlm = releases.make("qwen2_5_vl", tmp_path / "release")
    assert count_tokens(str(tmp_path / "release"), [(48, 32), (64, 64)]) == tuple(
        vlm.count_visual_tokens([(48, 32), (64, 64)])
    )


def test_what_has_no_images_in_conversations_is_named(tmp_path):
    with pytest.raises(PretrainedError, match=r"did you mean 'Qwen/Qwen2\.5-VL-7B-Instruct'"):
        count_tokens("Qwen/Qwen2.5-VL-7B-Instrct", [(8, 8)])
    for name in ("facebook/sam-vit-base", "google/siglip-so400m-patch14-384", "google/gemma-3-1b-it"):
        with pytest.raises(
            PretrainedError, match=tried("has no conversations with images, which are counted; name a whole system")
        ):
            count_tokens(name, [(8, 8)])
    (tmp_path / "whole").mkdir()
    vlm = releases.make("llava", tmp_path / "whole")
    assert count_tokens(str(tmp_path / "whole"), [(8, 8)]) == tuple(vlm.count_visual_tokens([(8, 8)]))
