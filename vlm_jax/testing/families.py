"""The interface of families, for every model type under test: `from vlm_jax.testing.families import *`.

A folder is made of the package's fixture `released_config(model_type)`: its tensors are random, and have the names and
shapes that the rules of the family give. So its numbers remain to be compared with a reference.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import vlm_jax
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.mismatch import CheckpointMismatch
from vlm_jax.checkpoints.params import export_params
from vlm_jax.checkpoints.saving import save_checkpoint
from vlm_jax.pretrained import FAMILIES
from vlm_jax.testing.kinds import check_names, leaves, under_test
from vlm_jax.testing.parameters import drawn

every_family = pytest.mark.parametrize("model_type", under_test(FAMILIES, "register_family"))
MOST_LAYERS = 8  # of a small config


def described(config, dtype=jnp.float32):
    """The description of a small released config."""
    families: Any = FAMILIES
    return families[config["model_type"]](config, {}, dtype=dtype, param_dtype=dtype)


@pytest.fixture
def release_folder(model_type, released_config, tmp_path):
    """A folder of the release, with random tensors."""
    assert released_config["model_type"] == model_type
    description = described(released_config)
    params = nn.meta.unbox(drawn(description.boxed_shapes()))
    made = tmp_path / "release"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(released_config))
    save_checkpoint(made, export_params(description.rules, params))
    return made


@every_family
def test_a_folder_is_loaded_and_written_back_bit_for_bit(model_type, release_folder, tmp_path):
    loaded = vlm_jax.from_pretrained(release_folder)
    loaded.save_pretrained(tmp_path / "again")
    before, after = open_checkpoint(release_folder), open_checkpoint(tmp_path / "again")
    assert sorted(before) == sorted(after)
    for name in before:
        np.testing.assert_array_equal(before[name][...], after[name][...], err_msg=name)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == loaded.config
    assert all(np.isfinite(leaf).all() for leaf in leaves(loaded.params).values())


@every_family
def test_a_missing_and_an_unknown_tensor_are_named(model_type, release_folder):
    tensors = {name: np.asarray(tensor[...]) for name, tensor in open_checkpoint(release_folder).items()}
    lost = sorted(tensors)[-1]
    del tensors[lost]
    (release_folder / "model.safetensors").unlink()
    save_checkpoint(release_folder, {**tensors, "unknown.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointMismatch) as raised:
        vlm_jax.from_pretrained(release_folder)
    assert lost in str(raised.value) and "unknown.weight" in str(raised.value)


@every_family
def test_every_dimension_of_every_parameter_of_a_family_is_named(model_type, released_config):
    check_names(described(released_config).boxed_shapes(), MOST_LAYERS)


@every_family
def test_parameters_have_the_dtype_that_is_asked_for(model_type, released_config):
    shapes = described(released_config, jnp.bfloat16).boxed_shapes()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
