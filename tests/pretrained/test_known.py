"""Released configs kept as data: each describes a module with the published number of parameters."""

import jax
import pytest
from flax import linen as nn

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known import describe_known, known_config, known_configs

_CLIP_UNUSED = 12_596_224 + 2048  # CLIP's last block and norm, which LLaVA and MobileVLM do not use
_SIGLIP_L_HEAD, _SO400M_HEAD = 12_595_200, 15_238_352  # timm's attention pooling, which DeepSeek-VL does not use
_LLAMA_7B, _LLAMA_13B, _MISTRAL_7B = 6_738_415_616, 13_015_864_320, 7_241_732_096  # model cards, to the last one
_CLIP_L_336 = 303_507_456  # the image tower, by transformers 5.23
_QWEN3_4B, _QWEN3_8B = 4_022_468_096, 8_190_735_360  # of their files
_RICE = _CLIP_L_336 - 577 * 1024 - 2 * 1024 + 32 + 2 * 1024 + 4097 * 4096  # and the merger but for its last layer

# Published number of parameters -> how many of them nothing here reads, or the files hold twice. A number is a
# count of transformers 5.23 on the meta device or of a model card; a string is billions by the page on the hub.
PUBLISHED: dict[str, tuple[int | str, int]] = {
    "AIDC-AI/Ovis2-1B": ("1.27", 151_936 * 896),  # the head is stored next to the table
    "AIDC-AI/Ovis2-2B": ("2.46", 151_936 * 1536),
    "AIDC-AI/Ovis2-4B": ("4.62", 151_936 * 2048),
    "AIDC-AI/Ovis2-8B": ("8.94", 0),
    "AIDC-AI/Ovis2-16B": ("16.2", 0),
    "AIDC-AI/Ovis2.5-2B": ("2.57", 0),
    "AIDC-AI/Ovis2.5-9B": ("9.17", 0),
    "HuggingFaceM4/Idefics3-8B-Llama3": ("8.46", 0),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": (256_484_928, 0),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (507_482_304, 0),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (2_246_784_880, 0),
    "OpenGVLab/InternVL2-8B": ("8.08", 0),
    "OpenGVLab/InternVL2-26B": ("25.5", 0),
    "OpenGVLab/InternVL2_5-1B": ("0.938", 0),
    "OpenGVLab/InternVL2_5-2B": ("2.21", 0),
    "OpenGVLab/InternVL2_5-4B": ("3.71", 0),
    "OpenGVLab/InternVL2_5-8B": ("8.08", 0),
    "OpenGVLab/InternVL3-1B": ("0.938", 0),
    "OpenGVLab/InternVL3-2B": ("2.09", 0),
    "OpenGVLab/InternVL3-8B": ("7.94", 0),
    "OpenGVLab/InternVL3-14B": ("15.1", 0),
    "OpenGVLab/InternVL3_5-1B": ("1.1", 0),
    "OpenGVLab/InternVL3_5-2B": ("2.3", 0),
    "OpenGVLab/InternVL3_5-4B": ("4.7", 0),
    "OpenGVLab/InternVL3_5-8B": ("8.5", 0),
    "OpenGVLab/InternVL3_5-14B": ("15.1", 0),
    "OpenGVLab/InternVL3_5-38B": ("38.4", 0),
    "OpenGVLab/InternVL3_5-30B-A3B": ("30.8", 0),
    "OpenGVLab/InternVL3_5-241B-A28B": ("240.7", 0),
    "OpenGVLab/InternViT-300M-448px": (304_012_288, 0),
    "OpenGVLab/InternViT-6B-448px-V1-5": (5_536_496_000, 0),
    # OpenCLIP's ViT-bigG/14 of 1.84 billion without class token, last norm and head; Qwen-7B of 7.72; the resampler.
    "Qwen/Qwen-VL": ("9.66", 0),
    "Qwen/Qwen2-VL-2B-Instruct": ("2.21", 0),
    "Qwen/Qwen2-VL-7B-Instruct": (8_291_375_616, 0),
    "Qwen/Qwen2-VL-72B-Instruct": ("73.4", 0),
    # The thinker, of 7B by the size of its files, with its audio encoder, by transformers 5.24.
    "Qwen/Qwen2.5-Omni-3B": (4_703_464_448, 637_676_544),
    "Qwen/Qwen2.5-Omni-7B": (8_931_813_888, 639_647_232),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("3.75", 0),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8_292_166_656, 0),
    "Qwen/Qwen2.5-VL-72B-Instruct": ("73.4", 0),
    # As transformers 5.24 counts, with one table where it is also the head.
    "Qwen/Qwen3-VL-2B-Instruct": (2_127_532_032, 0),
    "Qwen/Qwen3-VL-4B-Instruct": (4_437_815_808, 0),
    "Qwen/Qwen3-VL-8B-Instruct": (8_767_123_696, 0),
    "Qwen/Qwen3-VL-32B-Instruct": (33_357_390_064, 0),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (31_070_754_032, 0),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": (235_670_022_896, 0),
    # The same; without the layers that predict several tokens, which transformers does not read.
    "Qwen/Qwen3.5-0.8B": (852_985_920, 0),
    "Qwen/Qwen3.5-2B": (2_213_241_664, 0),
    "Qwen/Qwen3.5-4B": (4_539_265_536, 0),
    "Qwen/Qwen3.5-9B": (9_409_813_744, 0),
    "Qwen/Qwen3.5-27B": (27_356_728_560, 0),
    "Qwen/Qwen3.5-35B-A3B": (35_107_181_936, 0),
    "Qwen/Qwen3.5-122B-A10B": (122_562_817_776, 0),
    "Qwen/Qwen3.5-397B-A17B": (396_802_360_816, 0),
    # By the size of its files; CLIP's own patch convolution is not used.
    "deepseek-ai/DeepSeek-OCR": (3_336_106_240, 602_112),
    "deepseek-ai/DeepSeek-OCR-2": (3_389_119_360, 0),  # of its class in transformers
    "deepseek-ai/deepseek-vl-1.3b-base": ("1.98", _SIGLIP_L_HEAD),
    "deepseek-ai/deepseek-vl-7b-base": ("7.34", _SIGLIP_L_HEAD),
    "deepseek-ai/deepseek-vl2-tiny": ("3.37", _SO400M_HEAD),
    "deepseek-ai/deepseek-vl2-small": ("16.1", _SO400M_HEAD),
    "deepseek-ai/deepseek-vl2": ("27.5", _SO400M_HEAD),
    "facebook/dinov2-small": (22_056_576, 384),  # the mask token of the pretraining
    "facebook/dinov2-base": (86_580_480, 768),
    "facebook/dinov2-large": (304_368_640, 1024),
    "facebook/dinov2-giant": (1_136_480_768, 1536),
    "facebook/dinov2-with-registers-small": (22_058_112, 384),
    "facebook/dinov2-with-registers-base": (86_583_552, 768),
    "facebook/dinov2-with-registers-large": (304_372_736, 1024),
    "facebook/dinov2-with-registers-giant": (1_136_486_912, 1536),
    # As transformers 5.24 counts.
    "facebook/dinov3-vits16-pretrain-lvd1689m": (21_596_544, 384),
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": (28_692_864, 384),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (85_660_416, 768),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (303_129_600, 1024),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": (840_592_640, 1280),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": (6_716_035_072, 4096),
    "facebook/sam-vit-base": (89_670_912, 0),  # the image encoder
    "facebook/sam-vit-large": (308_278_272, 0),
    "facebook/sam-vit-huge": (637_026_048, 0),
    # As transformers 5.24 counts, with one table, which is also the head.
    "google/gemma-2b": (2_506_172_416, 0),
    "google/gemma-7b": (8_537_680_896, 0),
    "google/gemma-2-2b-it": (2_614_341_888, 0),
    "google/gemma-2-9b-it": (9_241_705_984, 0),
    "google/gemma-2-27b-it": (27_227_128_320, 0),
    "google/gemma-3-1b-it": (999_885_952, 0),
    "google/gemma-3-4b-it": (4_300_079_472, 0),
    "google/gemma-3-12b-it": (12_187_325_040, 0),
    "google/gemma-3-27b-it": (27_432_406_640, 0),
    "google/paligemma-3b-pt-224": (2_923_466_480, 0),
    "google/paligemma-3b-pt-448": (2_924_351_216, 0),
    "google/paligemma-3b-pt-896": (2_927_890_160, 0),
    "google/paligemma2-3b-pt-224": (3_032_242_416, 0),
    "google/paligemma2-3b-pt-448": (3_033_127_152, 0),
    "google/paligemma2-3b-pt-896": (3_036_666_096, 0),
    "google/paligemma2-10b-pt-224": (9_662_638_832, 0),
    "google/paligemma2-28b-pt-224": (27_650_487_024, 0),
    # The same, with what is stored and not learned; 30.7 and 25.2 billion by the README, without the tower.
    "google/gemma-4-26B-A4B-it": (25_805_936_206, 0),
    "google/gemma-4-31B-it": (31_273_088_876, 0),
    # With the audio tower and its projection, which are not read; 5.1 and 8 billion by the README.
    "google/gemma-4-E2B-it": (5_104_298_467, 307_184_384),
    "google/gemma-4-E4B-it": (7_941_101_802, 308_757_248),
    "google/siglip-base-patch16-224": (203_155_970, 0),
    "google/siglip-large-patch16-384": (652_478_466, 0),
    "google/siglip-so400m-patch14-224": (877_360_306, 0),
    "google/siglip-so400m-patch14-384": (877_960_498, 0),
    "google/siglip2-giant-opt-patch16-384": (1_871_885_426, 0),
    "google/siglip2-so400m-patch14-384": (1_136_008_498, 0),
    "google/vit-base-patch16-224-in21k": (86_389_248, 0),
    "google/vit-large-patch16-224-in21k": (304_351_232, 0),
    # 64 more words than Llama's, a projector of two layers, and a newline.
    "llava-hf/llava-1.5-7b-hf": (7_063_427_072, _CLIP_UNUSED),
    "llava-hf/llava-1.5-13b-hf": (_LLAMA_13B + 2 * 64 * 5120 + _CLIP_L_336 + 6145 * 5120 + 5120, _CLIP_UNUSED),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (7_063_427_072 + 4096, _CLIP_UNUSED),
    "llava-hf/llava-v1.6-vicuna-13b-hf": ("13.4", _CLIP_UNUSED),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        _MISTRAL_7B + 2 * 64 * 4096 + _CLIP_L_336 + 5121 * 4096 + 4096 + 4096,
        _CLIP_UNUSED,
    ),
    # SigLIP's last norm is not used.
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (893_675_552, 2304),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (8_030_807_584, 2304),
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": (73_181_570_592, 2304),
    # 4.7 and 8.5 billion by the README: Qwen3, of 4B with a head of its own; CLIP's tower without positions and its
    # last norm but with the angles of its class token; a merger of a norm and two linear layers.
    "lmms-lab/LLaVA-OneVision-1.5-4B-Instruct": (_QWEN3_4B + 151_936 * 2560 + _RICE + 4097 * 2560, 0),
    "lmms-lab/LLaVA-OneVision-1.5-8B-Instruct": (_QWEN3_8B + _RICE + 4097 * 4096, 0),
    "mtgv/MobileVLM_V2-1.7B": ("1.7", _CLIP_UNUSED),
    "mtgv/MobileVLM_V2-3B": ("3.0", _CLIP_UNUSED),
    # Two linear layers, and a 3x3 depthwise convolution.
    "mtgv/MobileVLM_V2-7B": (_LLAMA_7B + _CLIP_L_336 + (1025 + 4097 + 10) * 4096, _CLIP_UNUSED),
    "openbmb/MiniCPM-V-4.6": (1_300_428_016, 0),  # as transformers 5.24 counts, with one table, which is also the head
    "openai/clip-vit-base-patch16": (149_620_737, 0),
    "openai/clip-vit-base-patch32": (151_277_313, 0),
    "openai/clip-vit-large-patch14": (427_616_513, 0),
    "openai/clip-vit-large-patch14-336": (427_944_193, 0),
    # 7,652,065,472 with LoRA's 110,828,288 as its finetune.py prints; the last block and norm of both towers, and the
    # pooling of SigLIP, are not used.
    "openvla/openvla-7b": (7_652_065_472 - 110_828_288, 12_598_272 + 2048 + 15_239_504 + 2304 + _SO400M_HEAD),
}


@pytest.mark.parametrize("name", known_configs())
def test_a_known_config_has_the_published_number_of_parameters(name):
    published, unread = PUBLISHED[name]
    count = sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(describe_known(name).boxed_shapes()))) + unread
    if isinstance(published, str):
        assert f"{count / 1e9:.{len(published.split('.')[1])}f}" == published
    else:
        assert count == published


def test_every_published_number_is_of_a_known_config():
    assert set(PUBLISHED) == set(known_configs())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl"), ("deepseek-ai/deepseek-vl2", "deepseek_vl_v2")],
)
def test_a_config_is_found_by_its_name(name, kind):
    assert known_config(name)["model_type"] == kind


def test_another_name_is_refused_with_the_nearest():
    with pytest.raises(PretrainedError, match=r"no config of 'Qwen/Qwen2-VL-7b-instruct'.*'Qwen/Qwen2-VL-7B-Instruct'"):
        describe_known("Qwen/Qwen2-VL-7b-instruct")


@pytest.mark.parametrize(
    ("name", "side", "count"),
    [
        ("llava-hf/llava-1.5-7b-hf", 336, 576),
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 384, 729),  # of a tile
        ("mtgv/MobileVLM_V2-1.7B", 336, 144),
        ("Qwen/Qwen-VL", 448, 256),
        ("OpenGVLab/InternVL3-8B", 448, 256),  # of a tile
        ("deepseek-ai/DeepSeek-OCR", 1280, 400),  # its mode "large"
        ("deepseek-ai/DeepSeek-OCR-2", 1024, 256),
        ("deepseek-ai/DeepSeek-OCR-2", 768, 144),  # of a tile
        ("deepseek-ai/deepseek-vl2-tiny", 384, 14 * 14),  # of a tile
        ("deepseek-ai/deepseek-vl-1.3b-base", 384, 576),
        ("deepseek-ai/deepseek-vl-7b-base", 1024, 576),
        ("AIDC-AI/Ovis2-8B", 448, 256),  # of a tile
    ],
)
def test_visual_tokens_of_a_square_image(name, side, count):
    module = describe_known(name).module
    assert module.connector.num_tokens(module.encoder.grid(side, side)) == count
