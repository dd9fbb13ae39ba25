"""Values of a folder's JSON files of another type or size: one clear error with file and key, or read rightly."""

import ast
import copy
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint
from vlm_jax.pretrained import FAMILIES, known
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.loader import choose_family
from vlm_jax.pretrained.recognition import recognised
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.released_json import FORMS, ROLE, SECTIONS, check_released

from .folders import alphabet_folder, edit, golden_folder

ERRORS = (PretrainedError, CheckpointFileError, TokenizerError, ChatTemplateError)
# One golden folder of each kind of file and of sections.
FOLDERS = (
    *("llava16_anyres", "internvl2_qwen2", "deepseek_vl2_tiny", "deepseek_vl_hybrid", "ovis2_hf", "ovis2_5"),
    *("open_clip_vit", "bv_siglip2", "qwen_vl_v1"),
)
WRONG = ("257", [257, None], True, {"a": 1}, 1.5, float("nan"), -3, 2**31, None, [[1]], "")
# An unknown model is told by its value, and some flags by another that contradicts them.
UNNAMED = ("model_type", "model_name", "use_mla", "qkv_bias")


class Recorded(dict):
    """An object that notes which of its keys are read, and those of the objects in it."""

    def __init__(self, given: Mapping[str, Any], read: set[str]):
        super().__init__({k: Recorded(v, read) if isinstance(v, Mapping) else v for k, v in given.items()})
        self.read = read

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("name", known.known_configs())
def test_31_every_key_that_a_family_reads_has_a_form(name, monkeypatch):
    config, read = known.known_config(name), set()
    monkeypatch.setattr(known, "known_config", lambda name: Recorded(config, read))
    known.describe_known(name)
    check_released(config, name, PretrainedError)
    # Keys of rope's own section are checked where it is read.
    inside_rope = {
        *("type", "rope_type", "factor", "mrope_section", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"),
        *("low_freq_factor", "high_freq_factor", "full_attention", "sliding_attention"),
    }
    assert read - FORMS.keys() - SECTIONS - inside_rope - {"model_registry"} == set()


# Keys that `pretrained` reads from our own configs, and those that it checks where it reads them.
OF_OUR_CONFIGS = {
    *("connector", "decoder", "encoder", "init_from", "kind", "learning_rates", "positions", "processor", "reducer"),
    *("release", "stages", "token_budget", "out_dim", "stem_layers", "width_factor", "patches", "classifier"),
    *("classifier.weight", "rule"),
}
CHECKED_THERE = {
    *("base_model_name_or_path", "load_in_4bit", "load_in_8bit", "quant_algo", "quant_method", "llava", "variant"),
    *("beta_fast", "beta_slow", "factor", "high_freq_factor", "low_freq_factor", "long_factor", "short_factor"),
    *("mrope_section", "rope_type", "type", "truncate", "model_registry", "height", "longest_edge", "shortest_edge"),
    *("eos_token", "image_token", "pad_token", "unk_token", "video_token"),
}


def keys_in_code() -> set[str]:
    """Keys that modules of `pretrained` read with `settings["key"]` or `settings.get("key")`."""
    found = set()
    for path in pathlib.Path(vlm_jax.__path__[0], "pretrained").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                given = node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                given = node.args[0]
            else:
                continue
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                found.add(given.value)
    return found


def test_31_every_key_in_the_code_has_a_form():
    assert keys_in_code() - FORMS.keys() - SECTIONS - OF_OUR_CONFIGS - CHECKED_THERE == set()


def places(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in settings.items():
        if key in SECTIONS and isinstance(value, Mapping):
            yield from places(value, (*path, key))
        if key in FORMS or (key.endswith(ROLE) and path == ()):
            yield (*path, key)


def describe(path):
    """Everything that is read of a folder, without its tensors."""
    path, config = recognised(path, None)
    folder = path if path.is_dir() else path.parent
    described = choose_family(config, FAMILIES)(
        copy.deepcopy(config), open_checkpoint(path), dtype=jnp.float32, param_dtype=jnp.float32
    )
    return folder, config, described


@pytest.mark.parametrize("name", FOLDERS)
def test_31_values_of_other_types_in_configs(tmp_path, name):
    """Not one of them is another error than those that are shown as a message."""
    path = golden_folder(name, tmp_path / "folder")
    original = json.loads((path / "config.json").read_text())
    tried, strange = 0, []
    for place in places(original):
        for wrong in WRONG:
            (path / "config.json").write_text(json.dumps(original))
            edit(path, "config.json", place, wrong)
            tried += 1
            try:
                describe(path)
            except ERRORS as error:
                if place[-1] not in str(error) and place[-1] not in UNNAMED:
                    strange.append((place, wrong, f"does not name the key: {error}"))
            except Exception as error:
                strange.append((place, wrong, repr(error)[:200]))
    assert not strange, "\n".join(map(str, strange))
    assert tried > 50


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (file, key)
        for file, keys in {
            "preprocessor_config.json": "image_mean image_std size resample rescale_factor do_resize do_normalize",
            "tokenizer_config.json": "bos_token pad_token added_tokens_decoder additional_special_tokens chat_template",
            "generation_config.json": "eos_token_id pad_token_id repetition_penalty do_sample temperature top_p top_k",
            "special_tokens_map.json": "eos_token",
            "processor_config.json": "chat_template image_token image_seq_length",
        }.items()
        for key in keys.split()
    ],
)
def test_31_values_of_other_types_in_settings(tmp_path, file, key):
    """Each is refused with file and key by whatever reads it, or has the form."""
    path = alphabet_folder(tmp_path)
    form = FORMS.get(key)
    for wrong in WRONG:
        edit(path, file, (key,), wrong)
        accepted = form.accepts(wrong) if form is not None else isinstance(wrong, str | None)
        if accepted:
            continue
        with pytest.raises(ValueError, match=rf"{file}: {key}: expected .*, got "):
            check_all(path)


def check_all(path):
    from vlm_jax.generation.released import greedy_sampling
    from vlm_jax.pretrained.processing import settings
    from vlm_jax.processors.chat import ChatTemplate

    settings.image_settings(path, {})
    Tokenizer.from_folder(path)
    ChatTemplate.from_folder(path)
    greedy_sampling(path)


@pytest.mark.parametrize("ends", ["257", [3, None], [[3]], 1.5, True, float("nan"), -1, {}])
def test_16_end_ids_of_other_types(tmp_path, ends):
    edit(alphabet_folder(tmp_path), "generation_config.json", ("eos_token_id",), ends)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: expected a whole number"):
        _ = vlm_jax.from_pretrained(tmp_path).end_ids


@pytest.mark.parametrize("place", [("num_hidden_layers",), ("hidden_size",), ("vocab_size",), ("num_attention_heads",)])
@pytest.mark.parametrize("size", [2**31, 10**30, 0, -1])
def test_31_sizes_without_bounds(tmp_path, place, size):
    edit(alphabet_folder(tmp_path), "config.json", place, size)
    with pytest.raises(CheckpointFileError, match=rf"config\.json: {place[-1]}: expected a whole number from 1 to"):
        vlm_jax.from_pretrained(tmp_path)


def test_31_numbers_of_tiles_without_bounds(tmp_path):
    """All grids of as many tiles are listed."""
    path, told = golden_folder("internvl2_qwen2", tmp_path / "folder"), "expected a whole number from 0 to 256, got"
    edit(path, "config.json", ("max_dynamic_patch",), 2**20)
    with pytest.raises(CheckpointFileError, match=rf"config\.json: max_dynamic_patch: {told} 1048576"):
        vlm_jax.from_pretrained(path)
    for key in ("min_dynamic_patch", "min_patches", "max_patches"):
        with pytest.raises(PretrainedError, match=rf"a\.json: {key}: {told} 257"):
            check_released({key: 257}, "a.json", PretrainedError)


def test_31_more_layers_than_tensors(tmp_path):
    """Within the bounds of the form, but of no checkpoint of so few tensors."""
    edit(alphabet_folder(tmp_path), "config.json", ("num_hidden_layers",), 4000)
    with pytest.raises(PretrainedError, match=r"layers: expected at most 128 layers, .*12 tensors, got 4000"):
        vlm_jax.from_pretrained(tmp_path)


def test_31_json_that_is_nested_too_deeply(tmp_path):
    (alphabet_folder(tmp_path) / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointFileError, match=r"config\.json: not JSON, or nested too deeply"):
        vlm_jax.from_pretrained(tmp_path)


def test_31_one_number_for_all_channels(tmp_path):
    """As transformers takes them; two numbers are those of no picture."""
    path = golden_folder("ovis2", tmp_path / "folder")
    file = "preprocessor_config.json"
    for key in ("image_mean", "image_std"):
        edit(path, file, (key,), 0.5)
    model = vlm_jax.from_pretrained(path)
    picture = Image.new("RGB", (40, 30), (255, 0, 0))
    ask = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    pixels = np.asarray(model.processor(ask).images)
    assert set(np.unique(pixels)) <= {-1.0, 0.0, 1.0} and pixels.max() == 1
    edit(path, file, ("image_std",), [0.5, 0.5])
    with pytest.raises(PretrainedError, match=rf"{file}: .*image_std: expected a number"):
        _ = vlm_jax.from_pretrained(path).processor
