"""What a folder is, before any of its tensors is matched: read, or one sentence with the way on."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import vlm_jax
from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.resnet_stem import ResNetStem
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing import llava_hf
from vlm_jax.pretrained.processing.image_text import _filled
from vlm_jax.pretrained.recognition import QUANTISED_FILES, QUANTISED_KEYS
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.image_text import TextInputs
from vlm_jax.processors.tokenizer import TokenizerError

from ...advice import tried
from ...processors.letters import TOKENIZER
from .folders import alphabet_folder, edit, golden_folder

ASKED = [{"role": "user", "content": "ab"}]


def add_token(path, name):
    """Adds a token behind the alphabet's, whose table has no row for it."""
    whole = json.loads((path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    whole["added_tokens"].append({"id": 29, "content": name, "special": True, **flags})
    (path / "tokenizer.json").write_text(json.dumps(whole))


def refused(path, match, **options) -> str:
    with pytest.raises(PretrainedError, match=match) as caught:
        vlm_jax.from_pretrained(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "version": "gemm"}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_18_a_quantised_release_is_told_by_its_config(tmp_path, settings, method):
    edit(alphabet_folder(tmp_path), "config.json", ("quantization_config",), settings)
    (tmp_path / "model.safetensors").write_bytes(b"")  # no tensor is looked at
    assert "dequantize()" in refused(tmp_path, rf"its weights are quantised \({method}\), which is not read")
    told = tried("which is not read; load the release that is not quantised, or save it dequantised once")
    refused(tmp_path, told)
    assert vlm_jax.from_pretrained(alphabet_folder(tmp_path / "plain")).generate(ASKED, max_new_tokens=2).text == "cd"


@pytest.mark.parametrize(("name", "method"), QUANTISED_FILES.items())
def test_18_a_quantised_release_is_told_by_a_file(tmp_path, name, method):
    edit(alphabet_folder(tmp_path), name, ("bits",), 4)
    refused(tmp_path, rf"quantised \({method}, by its {name}\)")


@pytest.mark.parametrize(("ending", "method"), QUANTISED_KEYS.items())
def test_18_a_quantised_release_is_told_by_its_tensors(tmp_path, ending, method):
    path = alphabet_folder(tmp_path) / "model.safetensors"
    key = f"model.layers.0.mlp.up_proj{ending}"
    safetensors.numpy.save_file({**safetensors.numpy.load_file(path), key: np.zeros(2, np.int32)}, path)
    refused(tmp_path, rf"quantised \({method}: it has {key}\)")


@pytest.mark.parametrize("beside", [False, True])
def test_20_an_adapter_is_told_with_its_model(tmp_path, beside):
    if beside:
        shutil.copy(alphabet_folder(tmp_path / "base") / "config.json", tmp_path)
    edit(tmp_path, "adapter_config.json", ("peft_type",), "LORA")
    edit(tmp_path, "adapter_config.json", ("base_model_name_or_path",), "some/base-model")
    edit(tmp_path, "adapter_config.json", ("bias",), "none")  # a text, as peft writes it
    tensor = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((8, 32), np.float32)}
    safetensors.numpy.save_file(tensor, tmp_path / "adapter_model.safetensors")
    told = refused(tmp_path, "an adapter of 'some/base-model', not a model")
    assert f"from_pretrained('some/base-model', adapter='{tmp_path}')" in told


def test_18_gguf_is_told(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    refused(tmp_path, tried("GGUF files are not read; load the release's safetensors, or convert it once"))
    refused(tmp_path / "model-q4.gguf", "GGUF files are not read")
    alphabet_folder(tmp_path)  # adds the release's safetensors
    assert vlm_jax.from_pretrained(tmp_path).generate(ASKED, max_new_tokens=2).text == "cd"


@pytest.mark.parametrize("also", [False, True])
def test_29_a_hub_folder_of_open_clip(tmp_path, also):
    """Its weights have names of their own; `model.safetensors` beside them has those of transformers."""
    path = golden_folder("open_clip_vit", tmp_path / "folder")
    (path / "model.safetensors").rename(path / "open_clip_model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").unlink()
    (path / "open_clip_config.json").write_text(json.dumps(config if "model_cfg" in config else {"model_cfg": config}))
    if also:
        safetensors.numpy.save_file({"text_model.weight": np.zeros(2)}, path / "model.safetensors")
    read, wanted = (
        vlm_jax.from_pretrained(path),
        vlm_jax.from_pretrained(golden_folder("open_clip_vit", tmp_path / "b")),
    )
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    assert (read.encode_images([image]) == wanted.encode_images([image])).all()


@pytest.mark.parametrize(
    "place",
    [
        "chat_template.jinja",
        "chat_template.json",
        "processor_config.json",
        "tokenizer_config.json",
        "additional_chat_templates/default.jinja",
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_22_a_template_is_read_in_every_place(tmp_path, place, several):
    file, source = tmp_path / place, "{{ messages[0].content }}!"
    file.parent.mkdir(exist_ok=True)
    if place.endswith(".json"):
        edit(tmp_path, place, ("chat_template",), {"default": source, "tool_use": ""} if several else source)
    else:
        file.write_text(source)
    assert ChatTemplate.from_folder(tmp_path).render(ASKED) == "ab!"


def test_22_the_processors_template_comes_first(tmp_path):
    """As in transformers: of processor_config.json, then of separate files, then of the tokenizer."""
    for place, text in (("tokenizer_config.json", "c"), ("chat_template.json", "b"), ("processor_config.json", "a")):
        edit(tmp_path, place, ("chat_template",), text + "{{ messages[0].content }}")
        assert ChatTemplate.from_folder(tmp_path).render(ASKED) == f"{text}ab"


def test_17_a_token_that_the_table_has_no_row_for(tmp_path):
    """Added to the tokenizer, while the table was never resized: its logits would be NaN."""
    path = alphabet_folder(tmp_path)
    add_token(path, "<extra>")
    model = vlm_jax.from_pretrained(path)
    told = tried(
        "the token '{<extra>}' has the id {29}, but the model's table has only {29} rows; leave it out of the text"
    )
    with pytest.raises(TokenizerError, match=told):
        model.processor([{"role": "user", "content": "a<extra>"}])
    with pytest.raises(TokenizerError, match=told):
        model.generate([{"role": "user", "content": "a<extra>"}], max_new_tokens=2)
    assert model.generate(ASKED, max_new_tokens=2).text == "cd"


def test_17_padding_that_the_table_has_no_row_for(tmp_path):
    """A row of NaN would reach the other tokens through the attention's zeros."""
    path = alphabet_folder(tmp_path)
    add_token(path, "<extra>")
    edit(path, "tokenizer_config.json", ("pad_token",), "<extra>")
    model = vlm_jax.from_pretrained(path)
    longer = [{"role": "user", "content": "abcdef"}]
    logits = np.asarray(model.logits(model.processor.batch([ASKED, longer])))
    alone = np.asarray(model.logits(model.processor(ASKED)))
    np.testing.assert_allclose(logits[0, -alone.shape[1] :], alone[0], atol=1e-5)


def test_17_padding_of_a_text_tower_is_checked_with_the_folder():
    """Of CLIP and SigLIP, whose padding is not masked."""
    tower, tokenizer = TextTower(200, 6, 8, 1, 1, 8, causal=True, pooling="last"), copy.copy(TOKENIZER)
    tokenizer.pad_id = 199
    assert _filled(tokenizer, tower).pad_id == 199
    tokenizer.pad_id = 200
    told = tried(
        "the padding token has the id {200}, but the model's table has only {200} rows; name a pad_token of the"
    )
    with pytest.raises(TokenizerError, match=told):
        _filled(tokenizer, tower)
    tokenizer.pad_id = 0
    assert _filled(tokenizer, tower).pad_id == 0


def test_17_a_token_that_a_text_tower_has_no_row_for():
    """Of CLIP and SigLIP: an id outside their table."""
    inputs = TextInputs(TOKENIZER, 6, 2, table_rows=200)
    assert inputs(["abcabc"]).tolist() == [[1, 197, 198, 199, 197, 198]]
    with pytest.raises(TokenizerError, match=r"text 1: the token .* has the id .*, but the model's table has only 200"):
        inputs(["abcabc", "dd"])


def test_23_the_tokenizers_name_of_the_pictures_token_comes_first(tmp_path):
    """As in transformers: `image_token` of tokenizer_config.json stands before that of processor_config.json."""
    path = alphabet_folder(tmp_path)
    add_token(path, "<img_here>")
    edit(path, "tokenizer_config.json", ("image_token",), "<img_here>")
    edit(path, "processor_config.json", ("image_token",), "<image>")
    edit(path, "preprocessor_config.json", ("size",), {"shortest_edge": 28})
    edit(path, "preprocessor_config.json", ("crop_size",), {"height": 28, "width": 28})
    (path / "chat_template.jinja").write_text("{% for item in messages[0].content %}<img_here>{% endfor %}")
    made = llava_hf.processor(path, {"model_type": "llava", "vision_config": {"patch_size": 7}})
    batch = made([{"role": "user", "content": [{"type": "image"}]}], images=[Image.new("RGB", (40, 30))])
    assert (np.asarray(batch.visual_index) >= 0).sum() == 16


def test_18_half_a_model_is_told(tmp_path):
    path = golden_folder("internvl2_qwen2", tmp_path / "folder")
    edit(path, "config.json", ("llm_config", "model_type"), "qwen22")
    with pytest.raises(
        PretrainedError, match=r"llm_config\.model_type: no language model 'qwen22'; did you mean 'qwen2'"
    ):
        vlm_jax.from_pretrained(path)
    edit(path, "config.json", ("llm_config", "model_type"), "phi3")
    with pytest.warns(UserWarning, match="'phi3' is not read; only encoder and connector are loaded"):
        assert "decoder" not in vlm_jax.from_pretrained(path).params


def test_29_patches_of_two_on_the_map_of_a_stem(tmp_path):
    """A hybrid of vision_transformer: its embedding is a convolution of the stem's map without padding."""
    path = golden_folder("vit_jax_hybrid", tmp_path / "folder")
    arrays = dict(np.load(path / "model.npz"))
    channels, width = arrays["embedding/kernel"].shape[2:]
    kernel = np.random.default_rng(0).normal(size=(2, 2, channels, width)).astype(np.float32)
    np.savez(path / "model.npz", **{**arrays, "embedding/kernel": kernel})
    edit(path, "config.json", ("patches", "size"), [2, 2])
    model = vlm_jax.from_pretrained(path)
    batch = model.processor(images=[np.random.default_rng(1).integers(0, 255, (90, 80, 3), np.uint8)])
    assert batch.images.shape == (1, 80, 80, 3)  # 5 x 5 patches of 2 on a map with a step of 8 pixels
    encoder = model.module.encoder
    stem = ResNetStem(layers=encoder.stem_layers, width=encoder.stem_width)
    feature_map = stem.apply({"params": model.params["encoder"]["stem"]}, jnp.asarray(batch.images))
    dimensions = ("NHWC", "HWIO", "NHWC")
    embedded = jax.lax.conv_general_dilated(feature_map, kernel, (2, 2), "VALID", dimension_numbers=dimensions)
    images = jnp.asarray(batch.images)
    _, state = model.module.apply(
        {"params": model.params}, images, capture_intermediates=lambda module, _: module.name == "patch_embed"
    )
    (found,) = state["intermediates"]["encoder"]["patch_embed"]["__call__"]
    np.testing.assert_allclose(
        found[0], np.asarray(embedded).reshape(25, width) + arrays["embedding/bias"], rtol=1e-4, atol=1e-3
    )
    assert model.logits(batch).shape == (1, 7)
