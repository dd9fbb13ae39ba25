"""Processors of golden folders: they agree with their models, and disagreement is reported."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.pretrained import language
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing import PROCESSORS, check_conversations, gemma4, qwen_hf, read_processor, text
from vlm_jax.pretrained.processing.llava import canvases
from vlm_jax.pretrained.processing.settings import image_settings, video_pixels
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tokenizer import TokenizerError

from ..advice import tried
from ..processors.vocabularies import tiktoken_ranks


@pytest.mark.parametrize(
    ("name", "learned"), [("deepseek_vl2_tiny", 2), ("ovis2", 5), ("ovis2_5", 4), ("ovis2_5_window", 4)]
)
def test_a_folder_and_its_model_agree(name, learned):
    model = vlm_jax.from_pretrained(DATA / name)
    assert model.processor.num_learned == learned
    if model.module.decoder is not None:
        assert model.module.num_learned_rows == learned
    assert model.count_visual_tokens([(64, 64)]) == [len(model.processor.views.layouts([(64, 64)])[0])]
    wrong = dataclasses.replace(model.processor, num_learned=learned + 1)
    if model.module.decoder is not None:
        with pytest.raises(PretrainedError, match=f"has {learned + 1} learned rows, but the model {learned}"):
            check_conversations(wrong, model.module)


def test_other_tokens_of_a_tile_are_told():
    model = vlm_jax.from_pretrained(DATA / "deepseek_vl2_tiny")
    views = dataclasses.replace(model.processor.views, tokens=(3, 3))
    with pytest.raises(
        PretrainedError, match=tried("{9} tokens by the processor's files, but {4} in the model; fix image_seq_length")
    ):
        check_conversations(dataclasses.replace(model.processor, views=views), model.module)
    check_conversations(model.processor, model.module)


def test_other_patches_are_told():
    model = vlm_jax.from_pretrained(DATA / "ovis2_5")
    views = model.processor.views
    views = dataclasses.replace(views, format=dataclasses.replace(views.format, patch_size=4))
    with pytest.raises(PretrainedError, match="the processor has the patch format PatchFormat"):
        check_conversations(dataclasses.replace(model.processor, views=views), model.module)


def test_videos_have_what_is_stated_of_them_over_what_is_stated_of_pictures(tmp_path):
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"image_std": [1, 1, 1], "resample": None}))
    found = video_pixels(tmp_path, image_settings(tmp_path, {}))
    assert found == Pixels((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), Image.Resampling.BILINEAR, resizes_as="torch")
    for wrong, message in (
        ({"do_resize": False}, "video processor.do_resize: expected True, got False"),
        ({"rescale_factor": 1.0}, "video processor: rescale_factor: expected 1/255, got 1.0"),
        ({"resample": 4}, "video processor.resample: expected 2 or 3 or 1, got 4"),
    ):
        (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": wrong}))
        with pytest.raises(PretrainedError, match=message):
            video_pixels(tmp_path, image_settings(tmp_path, {}))


def test_a_model_without_a_processor_is_told():
    model = vlm_jax.from_pretrained(DATA / "s2_siglip")
    with pytest.raises(PretrainedError, match=r"no processor is registered for 'sam'; registered: .* big_vision\."):
        read_processor(model.folder, {**model.config, "model_type": "sam"}, model.module, None)


def test_another_size_of_pictures_is_told(tmp_path):
    shutil.copytree(DATA / "s2_siglip", tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 48, "width": 48}}))
    needs = tried(
        "{images} of {(48, 48)} pixels, but the model needs {(32, 32)}; set size and crop_size, or patch_size, in"
    )
    with pytest.raises(PretrainedError, match=needs):
        _ = vlm_jax.from_pretrained(tmp_path).processor
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    assert vlm_jax.from_pretrained(tmp_path).processor([Image.new("RGB", (9, 9))]).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("pinpoints", "expected"),
    [
        ([[336, 672], [672, 336]], ((672, 336), (336, 672))),
        ("[[336, 672], [672, 336]]", ((672, 336), (336, 672))),
        ("(1x1),...,(2x2)", ((336, 336), (672, 336), (336, 672), (672, 672))),
    ],
)
def test_canvases_in_every_form(pinpoints, expected):
    assert canvases(pinpoints, 336, "llava") == expected


@pytest.mark.parametrize(
    ("pinpoints", "told"),
    [
        ("1x1", "expected pairs of pixels, got '1x1'"),
        ("[" * 100_000, "expected pairs of pixels, got "),
        ("(1x1),...,(20000x20000)", r"expected grids of 1 to 12 tiles .*, got '\(1x1\),...,\(20000x20000\)'"),
        ("(20000x20000)", "expected grids of 1 to 12 tiles"),
        (f"(1x1),...,({'9' * 5000}x1)", "expected grids of 1 to 12 tiles"),
        ("(0x0),...,(2x2)", "expected grids of 1 to 12 tiles"),
        ("(2x2),...,(1x1)", "expected a list, each a list of 2 items.*, got "),
        ("[[336, 99999999]]", "expected a list, each a list of 2 items.*, got "),
        ("[[336, 672, 3]]", "expected a list, each a list of 2 items.*, got "),
        ("[336, 672]", "expected a list, each a list of 2 items.*, got "),
        ([], "expected a list"),
        ([[336, 700]], r"expected multiples of a tile of 336 pixels, got \[336, 700\]"),
        ([[100, 336]], r"expected multiples of a tile of 336 pixels, got \[100, 336\]"),
    ],
)
def test_canvases_of_another_form_or_size(pinpoints, told):
    with pytest.raises(PretrainedError, match=rf"llava\.image_grid_pinpoints: {told}"):
        canvases(pinpoints, 336, "llava")


def tokenizer_files(folder, *added):
    """Bytes, and tokens that releases add."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", *added])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
# Of a golden folder's config: added tokens, files of the processor, and the prompt but for what images take.
RELEASES = {
    "llava15": ([], {}, " USER: [image]\nWhat? ASSISTANT:"),
    "llava16_anyres": ([], {}, " USER: [image]\nWhat? ASSISTANT:"),
    "mobilevlm_v2": ([], {}, " USER: [image]\nWhat? ASSISTANT:"),
    "internvl2_qwen2": (
        ["<img>", "</img>", "<IMG_CONTEXT>"],
        {},
        "<|im_end|><|im_start|>user\n<img>[image]</img>\nWhat?<|im_end|><|im_start|>assistant\n",
    ),
    "deepseek_vl_siglip": (
        ["<image_placeholder>"],
        {
            "processor_config.json": {"num_image_tokens": 144},
            "preprocessor_config.json": {"image_size": 96, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        },
        "\n\nUser: [image]What?\n\nAssistant:",
    ),
}


def model_of_release(name, folder, *more):
    """That of a golden folder, with files of a processor in another one."""
    added, files, _ = RELEASES[name]
    tokenizer_files(folder, *added, *more)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    config = json.loads((DATA / name / "config.json").read_text())
    for file, key in (("vision_tower_config.json", "vision_tower_config"), ("tiny_registry.json", "model_registry")):
        if (DATA / name / file).exists():
            config[key] = json.loads((DATA / name / file).read_text())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(DATA / name / "model.safetensors")
    return vlm_jax.from_pretrained(folder)


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_without_a_chat_template(name, tmp_path):
    model, ending = model_of_release(name, tmp_path), RELEASES[name][-1]
    image = np.full((50, 90, 3), 200, np.uint8)
    # The model's table is smaller than the tokenizer of the test.
    batch = dataclasses.replace(model.processor, table_rows=None)(MESSAGES, [image])
    places = batch.visual_index[0] >= 0
    assert int(places.sum()) == model.count_visual_tokens([(50, 90)])[0]
    first, last = np.flatnonzero(places)[[0, -1]]
    assert places[first : last + 1].all()
    decode = functools.partial(model.processor.prompt.tokenizer.decode, skip_special=False)
    text = f"{decode(batch.tokens[0, :first])}[image]{decode(batch.tokens[0, last + 1 :])}"
    assert text.startswith("<s>") and text.endswith(ending)
    assert text.count("<s>") == 1
    # Every row of the table that a place names is there, and but for a canvas's borders the last is named.
    module, (_, tiles, height, width, _) = model.module, batch.images.shape
    rows = tiles * module.connector.num_tokens(module.encoder.grid(height, width)) + module.num_learned_rows
    named = batch.visual_index.max()
    assert named < rows if model.config.get("image_aspect_ratio") == "anyres" else named == rows - 1
    logits = jax.eval_shape(lambda params, batch: module.apply({"params": params}, batch), model.params, batch)
    assert logits.shape[:2] == batch.tokens.shape


# Of golden folders: what the release's own code stops at. Its config states another, or none.
ENDS = {
    "internvl2_qwen2": ("<|im_end|>",),
    "llava15": ("</s>",),
    "llava16_anyres": ("</s>",),
    "mobilevlm_v2": ("</s>",),
    "deepseek_vl_siglip": ("</s>",),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("stated", [None, 300, [301, 300]])
def test_an_answer_ends_where_the_releases_own_code_ends_it(name, stated, tmp_path):
    """As `chat()` or the inference script of the release, whose generation config may state more."""
    model = model_of_release(name, tmp_path, "<|im_end|>")
    ids = [model.tokenizer.id_of(token) for token in ENDS[name]]
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        ids = [*(stated if isinstance(stated, list) else [stated]), *ids]
    assert model.end_ids == tuple(ids)


@pytest.mark.parametrize("name", ["ovis2", "ovis2_5", "deepseek_vl2_tiny"])
def test_an_answer_ends_where_the_tokenizer_of_the_folder_says(name):
    model = vlm_jax.from_pretrained(DATA / name)
    assert model.end_ids == (model.tokenizer.eos_id,)


def test_qwen_vl_ends_at_either_end_of_a_turn(tmp_path):
    """chat() stops at both tokens of ChatML, and at <|endoftext|> of the generation config."""
    (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_ranks())
    shutil.copytree(DATA / "qwen_vl_v1", tmp_path, dirs_exist_ok=True)
    model = vlm_jax.from_pretrained(tmp_path)
    names = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    assert model.end_ids == tuple(map(model.tokenizer.id_of, names))


def test_an_end_that_the_vocabulary_lacks_is_named(tmp_path):
    model = model_of_release("internvl2_qwen2", tmp_path)
    with pytest.raises(TokenizerError, match=r"its vocabulary has no token '<\|im_end\|>'"):
        _ = model.end_ids


def test_internlm2_ends_at_the_end_of_a_turn(tmp_path):
    tokenizer_files(tmp_path, "<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    processor = text.processor(tmp_path, {"model_type": "internlm2"})
    assert processor.end_tokens == ("</s>", "<|im_end|>")
    assert text.processor(tmp_path, {"model_type": "llama"}).end_tokens == ()


def test_qwen3_5_ends_at_the_end_of_a_turn(tmp_path):
    """Its config.json states the end of a text alone; a generation config may state more."""
    ends, tags = (
        ("<|im_end|>", "<|endoftext|>"),
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    )
    tokenizer_files(tmp_path, *ends, *tags)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 16}))
    assert qwen_hf.processor3(tmp_path, {"model_type": "qwen3_5"}).end_tokens == ends


def test_every_frame_of_a_long_video_of_gemma_4_has_its_tokens(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    views = gemma4.views(tmp_path, {})
    for num_frames in (1, 768, 2000):
        layouts = views.video_layouts(num_frames, (480, 480))
        assert [len(layout) for layout in layouts] == [64] * num_frames  # 8 x 8 of at most 70


@pytest.mark.parametrize("kind", sorted(language.FAMILIES))
def test_every_language_model_alone_has_a_processor(kind, tmp_path):
    tokenizer_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    processor = PROCESSORS[kind](tmp_path, {"model_type": kind})
    batch = processor([{"role": "user", "content": "ab"}])
    assert batch.images is None and processor.prompt.tokenizer.decode(batch.tokens[0]) == "ab!"
