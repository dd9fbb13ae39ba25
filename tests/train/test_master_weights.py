"""Trained parts are float32 under bfloat16 compute and `param_dtype`; frozen ones are of `param_dtype`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import finetune
from tests.contracts import releases
from vlm_jax.build import build
from vlm_jax.train.loop import Trainer

RATE = 1e-5  # far below bfloat16's spacing of 0.002 at a weight of 0.3
MIXED = {"encoder": {"bfloat16"}, "connector": {"float32"}, "decoder": {"float32"}}


def dtypes(params):
    return {part: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for part, tree in params.items()}


def test_small_updates_of_bfloat16_compute_are_kept(config, one_device, tmp_path):
    with config.unlocked():
        config.dtype = config.param_dtype = "bfloat16"
        config.schedule = ("answering",)
        del config.stages["seeing"]
        rates = {"connector": RATE, "decoder": RATE}
        config.stages.answering.update({"steps": 1, "warmup_steps": 0, "learning_rates": rates})
        config.optimizer.update({"weight_decay": 0.0, "clip_norm": 1e9})
    experiment = build(config)
    before = experiment.initial(jax.random.key(config.seed), one_device)
    assert dtypes(before) == MIXED
    after = Trainer(config, experiment, one_device, tmp_path).run().params
    assert dtypes(after) == dtypes(before)
    kernels = [
        (old, new)
        for old, new in zip(jax.tree.leaves(before["decoder"]), jax.tree.leaves(after["decoder"]), strict=True)
        if old.ndim > 2
    ]
    assert kernels
    for old, new in kernels:  # the first step of Adam is the rate, whatever the gradient
        assert np.median(np.abs(np.asarray(new) - np.asarray(old))) == pytest.approx(RATE, rel=0.02)
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], before["encoder"])


def test_trained_parts_of_a_release_are_read_in_float32(one_device, tmp_path):
    releases.make("llava", tmp_path)
    config = finetune.get_config()  # trains connector and decoder
    with config.unlocked():
        config.release = str(tmp_path)

    def initial(dtype):
        config.param_dtype = dtype
        return build(config).initial(jax.random.key(0), one_device)

    whole, mixed = initial("float32"), initial("bfloat16")
    assert dtypes(mixed) == MIXED
    for part in ("connector", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, mixed[part], whole[part])
    kernels = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole["encoder"])
    jax.tree.map(np.testing.assert_array_equal, mixed["encoder"], kernels)
