"""LLaVA's and MobileVLM's towers where releases have them: named by the config, in a separate folder."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.llava import PREFIX

from ..advice import tried

NAMES = ("llava15", "mobilevlm_v2")


def released(name, folder, *, tower, inside=False, whole=False):
    """A golden folder as two: the model, with the tower's tensors if `inside`, and the tower, a whole CLIP or not."""
    shutil.copytree(DATA / name, folder / "model")
    shutil.rmtree(folder / "clip", ignore_errors=True)
    (folder / "clip").mkdir()
    config = json.loads((DATA / name / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "mm_vision_tower": tower}))
    own = json.loads((DATA / name / "vision_tower_config.json").read_text())
    own = {"model_type": "clip", "vision_config": own} if whole else {**own, "model_type": "clip_vision_model"}
    (folder / "clip" / "config.json").write_text(json.dumps(own))
    if not inside:
        tensors = load_file(DATA / name / "model.safetensors")
        tower = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
        assert tower
        left = {key: tensor for key, tensor in tensors.items() if key not in tower}
        save_file(left, folder / "model" / "model.safetensors")
        renamed = {"vision_model." + key.removeprefix(PREFIX): tensor for key, tensor in tower.items()}
        more = {"text_model.final_layer_norm.weight": np.ones(2, np.float32)} if whole else {}
        save_file({**renamed, **more}, folder / "clip" / "model.safetensors")
    return folder / "model"


def told(name):
    """The same with the tower's config given by hand."""
    config, own = (json.loads((DATA / name / file).read_text()) for file in ("config.json", "vision_tower_config.json"))
    return vlm_jax.from_pretrained(DATA / name, config={**config, "vision_tower_config": own})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_tower_beside_the_model(name, inside, whole, tmp_path):
    ours = vlm_jax.from_pretrained(released(name, tmp_path, tower="../clip", inside=inside, whole=whole))
    jax.tree.map(np.testing.assert_array_equal, ours.params, told(name).params)
    # The written folder is self-contained.
    ours.save_pretrained(tmp_path / "out")
    shutil.rmtree(tmp_path / "clip")
    again = vlm_jax.from_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    assert set(again.checkpoint) == set(told(name).checkpoint)


def test_a_tower_by_its_path_and_from_the_hub(tmp_path, monkeypatch):
    params = told("llava15").params
    folder = released("llava15", tmp_path, tower=str(tmp_path / "clip"))
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.from_pretrained(folder).params, params)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    shutil.copytree(tmp_path / "clip", tmp_path / "towers" / "clip")
    moved = released("llava15", tmp_path / "here", tower="towers/clip")
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.from_pretrained(moved).params, params)

    asked = []

    def download(name, **_):
        asked.append(name)
        return str(tmp_path / "clip")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "someone/clip"}))
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.from_pretrained(folder).params, params)
    assert asked == ["someone/clip"]


def test_what_a_tower_is_not(tmp_path):
    lost = released("llava15", tmp_path / "lost", tower="../nowhere/clip")
    with pytest.raises(PretrainedError, match=r"mm_vision_tower: .* no tensors of its vision tower, and '\.\./nowhere"):
        vlm_jax.from_pretrained(lost)
    with pytest.raises(PretrainedError, match=tried("Download the tower and set {mm_vision_tower} to its folder ({})")):
        vlm_jax.from_pretrained(lost)
    config = json.loads((lost / "config.json").read_text())
    (lost / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(tmp_path / "lost" / "clip")}))
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.from_pretrained(lost).params, told("llava15").params)
    other = released("llava15", tmp_path / "other", tower="../clip")
    (tmp_path / "other" / "clip" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(PretrainedError, match="expected a config of clip or clip_vision_model, got 'siglip'"):
        vlm_jax.from_pretrained(other)
    bare = released("llava15", tmp_path / "bare", tower="../clip")
    save_file({"text_model.x": np.ones(1, np.float32)}, tmp_path / "bare" / "clip" / "model.safetensors")
    with pytest.raises(PretrainedError, match=r"expected the image tower of a CLIP, .* got text_model\.x"):
        vlm_jax.from_pretrained(bare)


def test_an_unknown_model_is_named_before_its_tower_is_looked_for(tmp_path):
    folder = released("llava15", tmp_path, tower="../nowhere/clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava_other"}))
    with pytest.raises(PretrainedError, match="no family is registered for 'llava_other'"):
        vlm_jax.from_pretrained(folder)


def test_the_processor_knows_the_tower(tmp_path):
    """Sizes of images are the tower's, which only its own folder states."""
    from vlm_jax.pretrained.processing import llava

    ours = vlm_jax.from_pretrained(released("llava15", tmp_path, tower="../clip"))
    own = json.loads((DATA / "llava15" / "vision_tower_config.json").read_text())
    assert llava.views(ours.folder, ours.config).size == (own["image_size"], own["image_size"])
