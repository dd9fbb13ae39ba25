"""The public loader: files in, files out, devices, and everything that is rejected."""

import inspect
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.checkpoints import release
from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint
from vlm_jax.checkpoints.mismatch import CheckpointMismatch
from vlm_jax.checkpoints.release import Release
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.family import PretrainedError, find_prefix, one_side, square_root
from vlm_jax.sharding.mesh import MeshSettings, make_mesh

from ..advice import tried

ARCHIVE, TORCH = DATA / "vit_jax_token", DATA / "open_clip_rn"


def arrays(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture
def folder(tmp_path):
    """A copy of an archive that a test may spoil."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.npz"):
        shutil.copyfile(ARCHIVE / name, copy / name)
    return copy


def spoil(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_importing_the_package_imports_no_jax():
    code = "import sys, vlm_jax; assert 'jax' not in sys.modules; assert vlm_jax.from_pretrained"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'from_scratch'"):
        _ = vlm_jax.from_scratch


def test_an_archive_is_written_back_as_it_was(tmp_path):
    loaded = vlm_jax.from_pretrained(ARCHIVE)
    files = loaded.save_pretrained(tmp_path / "saved")
    assert files[0].name == "config.json" and files[-1].name == "model.npz"
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == loaded.config
    original, again = arrays(ARCHIVE / "model.npz"), arrays(tmp_path / "saved" / "model.npz")
    assert original.keys() == again.keys()
    for key, array in original.items():
        np.testing.assert_array_equal(again[key], array)
    exists = tried("exists: write to another folder, or remove the old checkpoint")
    with pytest.raises(CheckpointFileError, match=exists):
        loaded.save_pretrained(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "another")
    (tmp_path / "saved" / "model.npz").unlink()
    loaded.save_pretrained(tmp_path / "saved")
    assert arrays(tmp_path / "saved" / "model.npz").keys() == arrays(tmp_path / "another" / "model.npz").keys()


@pytest.mark.parametrize("target", [None, 3, "", " ", "a\0b", b"saved", "gs://bucket/saved"])
def test_what_is_no_folder_is_named_and_nothing_is_written(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    loaded = vlm_jax.from_pretrained(ARCHIVE)
    save = inspect.unwrap(type(loaded).save_pretrained)  # without the checks of types, which are before it in tests
    monkeypatch.setattr(Release, "save", inspect.unwrap(Release.save))
    told = tried("expected the path of a local folder to write, got {}; pass one, as 'saved/1'")
    with pytest.raises(CheckpointFileError, match=told) as caught:
        save(loaded, target)
    assert repr(target) in str(caught.value) and not list(tmp_path.iterdir())


def test_a_folder_is_relative_or_of_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for target, place in (("saved/1", tmp_path / "saved" / "1"), ("~/1", tmp_path / "home" / "1")):
        files = vlm_jax.from_pretrained(ARCHIVE).save_pretrained(target)
        assert files[-1] == place / "model.npz" and files[-1].exists()


def test_weights_are_written_last_and_a_failed_save_can_be_tried_again(tmp_path, monkeypatch):
    loaded = vlm_jax.from_pretrained(ARCHIVE)

    def full(folder, tensors):
        assert (folder / "config.json").exists()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(release, "save_archive", full)
        with pytest.raises(OSError, match="No space left"):
            loaded.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert arrays(tmp_path / "model.npz").keys() == arrays(ARCHIVE / "model.npz").keys()


def test_files_of_the_tokenizer_and_its_templates_come_along(tmp_path):
    source, saved = tmp_path / "released", tmp_path / "saved"
    shutil.copytree(ARCHIVE, source)
    texts = {
        "tokenizer_config.json": "{}",
        "merges.txt": "a b",
        "qwen.tiktoken": "YQ== 0",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
    }
    (source / "additional_chat_templates").mkdir()
    for name, text in {**texts, "weights.bin": "no"}.items():
        (source / name).write_text(text)
    files = vlm_jax.from_pretrained(source).save_pretrained(saved)
    assert all(path.exists() for path in files)
    for name, text in texts.items():
        assert (saved / name) in files and (saved / name).read_text() == text
    assert not (saved / "weights.bin").exists()


def test_ignored_tensors_and_changed_parameters_are_written(tmp_path):
    loaded = vlm_jax.from_pretrained(TORCH)
    params = jax.tree.map(lambda leaf: leaf + 1, loaded.params)
    loaded.save_pretrained(tmp_path, params=params)
    original, again = open_checkpoint(TORCH), open_checkpoint(tmp_path)
    assert original.keys() == again.keys()
    for key, tensor in original.items():
        counter = key.endswith("num_batches_tracked")
        np.testing.assert_array_equal(again[key][...], tensor[...] + (0 if counter else 1))


def test_an_archive_without_a_config_takes_one(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointFileError, match=r"config\.json: no such file"):
        vlm_jax.from_pretrained(folder / "model.npz")
    loaded = vlm_jax.from_pretrained(folder / "model.npz", config=config)
    assert loaded.config == config


@pytest.mark.parametrize("name", ["vit_jax_gap", "bv_vit_map_learn"])
def test_without_classes_the_encoder_stands_alone(tmp_path, name):
    tensors = arrays(DATA / name / "model.npz")
    np.savez(tmp_path / "model.npz", **{key: x for key, x in tensors.items() if "head/" not in key})
    config = {**json.loads((DATA / name / "config.json").read_text()), "num_classes": None}
    alone = vlm_jax.from_pretrained(tmp_path, config=config)
    under_a_head = vlm_jax.from_pretrained(DATA / name)
    jax.tree.map(np.testing.assert_array_equal, alone.params, under_a_head.params["encoder"])
    resized = vlm_jax.from_pretrained(tmp_path, config=config, image_size=48)
    assert resized.params["positions"]["table"].shape[0] == 144


def test_a_representation_may_be_as_wide_as_the_model():
    config = {"model_name": "vit", "num_classes": 9, "model": {"variant": "Ti/16", "rep_size": True}}
    tables = {"params/pos_embedding": np.zeros((1, 4, 192), np.float32)}
    description = FAMILIES["big_vision.vit"](config, tables, dtype=jnp.float32, param_dtype=jnp.float32)
    encoder = description.module.encoder
    assert encoder.representation_size == encoder.width == 192 and encoder.image_size == (32, 32)


def test_shards_go_to_their_devices():
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    sharded, whole = vlm_jax.from_pretrained(ARCHIVE, mesh=mesh), vlm_jax.from_pretrained(ARCHIVE)
    kernel = sharded.params["encoder"]["blocks"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.mesh.shape == mesh.shape
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(np.testing.assert_array_equal, sharded.params, whole.params)
    resized = vlm_jax.from_pretrained(ARCHIVE, mesh=mesh, image_size=48)
    assert resized.params["encoder"]["positions"]["table"].shape[0] == 144
    assert {leaf.sharding.mesh.shape_tuple for leaf in jax.tree.leaves(resized.params)} == {mesh.shape_tuple}


def test_parameters_have_the_dtype_asked_for():
    loaded = vlm_jax.from_pretrained(ARCHIVE, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    image = jnp.zeros((1, 32, 32, 3))
    whole = jax.jit(vlm_jax.from_pretrained(ARCHIVE).apply)(image)
    np.testing.assert_allclose(jax.jit(loaded.apply)(image), whole, atol=0.05)


def test_all_keys_that_are_wrong_are_listed_at_once(folder):
    changed = arrays(folder / "model.npz")
    changed["heads/kernel"] = changed.pop("head/kernel")
    changed["cls"] = changed["cls"][..., :-1]
    np.savez(folder / "model.npz", **changed)
    with pytest.raises(CheckpointMismatch) as error:
        vlm_jax.from_pretrained(folder)
    message = str(error.value)
    assert "3 problems" in message
    for line in ("missing from the checkpoint: head/kernel", "unused: heads/kernel", "wrong shape: cls"):
        assert line in message


def test_pickles_are_refused(folder):
    (folder / "model.npz").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointFileError, match="pickled checkpoints are not read"):
        vlm_jax.from_pretrained(folder)


def test_an_unknown_kind_lists_the_known_ones(folder):
    spoil(folder, model_type="sigklip")
    with pytest.raises(PretrainedError, match=r"'sigklip'; did you mean 'siglip'\?\nregistered: .*clip.*vit_jax"):
        vlm_jax.from_pretrained(folder)
    (folder / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(PretrainedError, match=r"has no model type.*got hidden_size"):
        vlm_jax.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier": "map"}, "classifier: expected 'token' or 'gap' .*got 'map'"),
        ({"patches": {"size": [4, 2]}}, r"patches\.size: expected a square"),
    ],
)
def test_settings_that_are_not_computed_are_named(folder, change, message):
    spoil(folder, **change)
    with pytest.raises(PretrainedError, match=message):
        vlm_jax.from_pretrained(folder)


def test_a_required_key_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    with pytest.raises(PretrainedError, match="expected the key hidden_size"):
        vlm_jax.from_pretrained(folder, config=config)


def test_switches_of_open_clip_that_change_the_maths_are_named():
    config = json.loads((TORCH / "config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"attentional_pool": True, "patch_dropout": 0.0}
    with pytest.raises(PretrainedError, match=r"vision_cfg\.attentional_pool: True is not supported"):
        vlm_jax.from_pretrained(TORCH, config=config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bv_vit_map_learn", {"variant": "XL/16"}, r"variant: unknown 'XL'; expected one of .*So400m"),
        ("bv_vit_map_learn", {"posemb": "rope"}, "posemb: expected 'learn' or 'sincos2d', got 'rope'"),
    ],
)
def test_settings_of_big_vision_that_are_not_known_are_named(name, change, message):
    config = json.loads((DATA / name / "config.json").read_text())
    config["model"] |= change
    with pytest.raises(PretrainedError, match=message):
        vlm_jax.from_pretrained(DATA / name, config=config)


def test_naflex_positions_must_be_a_learned_grid():
    name = "bv_siglip2_naflex"
    config = json.loads((DATA / name / "config.json").read_text())
    config["model"]["image"]["posemb"] = "learn_1d"
    with pytest.raises(PretrainedError, match="posemb: expected 'learn_2d'"):
        vlm_jax.from_pretrained(DATA / name, config=config)


def test_other_arguments_are_checked():
    with pytest.raises(PretrainedError, match="dtype: expected one of float32, bfloat16, float16, got 'float64'"):
        vlm_jax.from_pretrained(ARCHIVE, dtype="float64")
    with pytest.raises(PretrainedError, match="'open_clip' does not support resizing at load"):
        vlm_jax.from_pretrained(TORCH, image_size=96)


def test_prefixes_and_squares_are_found_or_refused():
    assert find_prefix(["vit.cls", "head"], "cls") == "vit."
    assert find_prefix(["cls", "xcls"], "cls") == find_prefix([], "cls") == ""
    with pytest.raises(PretrainedError, match=r"under 'a\.', 'b\.'"):
        find_prefix(["a.cls", "b.cls"], "cls")
    assert one_side([3, 3], "x") == one_side(3, "x") == square_root(9, "x") == 3
    with pytest.raises(PretrainedError, match="x: expected the rows of a square grid, got 8"):
        square_root(8, "x")
