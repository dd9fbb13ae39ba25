"""Steps of generation on abstract values against closed forms of the cache, and the largest batch that fits."""

import dataclasses

import jax
import pytest

from vlm_jax.config import ConfigError, parse
from vlm_jax.planner.inference import inference_work
from vlm_jax.planner.memory import Memory
from vlm_jax.planner.search import largest_batch
from vlm_jax.planner.settings import planned
from vlm_jax.sharding.mesh import MeshSettings, make_mesh

from .conftest import WIDTH

CONTEXT, BATCH = 128, 16


@pytest.fixture(scope="module")
def works(config):
    own, experiment = planned(config, 8)
    mesh = make_mesh(parse(MeshSettings, own.mesh, "config.mesh"), jax.devices())
    given = {"batch_size": BATCH, "context": CONTEXT}
    return {stage: inference_work(own, experiment, mesh, stage=stage, **given) for stage in ("prefill", "decode")}


def test_the_cache_is_in_bfloat16_over_the_rows_of_a_device(works):
    cache = works["decode"].arguments["cache"]
    key, value = cache.layers
    assert key.dtype == value.dtype == "bfloat16" and key.size == value.size == 2 * BATCH * CONTEXT * WIDTH
    assert key.sharding.shard_shape(key.shape)[1] == BATCH // 8
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(works["decode"].arguments["parameters of decoder"]))


def test_a_decoded_token_multiplies_every_kernel_of_the_decoder_once(works):
    """Kaplan et al. 2020, section 2.1: two FLOPs a parameter, and attention over the whole cache."""
    kernels = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * 2 * WIDTH) + WIDTH * 26
    attention = 2 * 2 * 2 * WIDTH * (CONTEXT + 1)
    assert works["decode"].model_flops == BATCH * (2 * kernels + attention) and works["decode"].tokens == BATCH
    assert works["prefill"].tokens == BATCH * 68


def test_sizes_that_do_not_fit_are_named(config):
    own, experiment = planned(config, 8)
    mesh = make_mesh(parse(MeshSettings, own.mesh, "config.mesh"), jax.devices())
    with pytest.raises(ConfigError, match="--context: expected at least the prompt's 68"):
        inference_work(own, experiment, mesh, stage="decode", batch_size=8, context=10)
    with pytest.raises(ConfigError, match="12 prompts cannot be divided over 8 shards"):
        inference_work(own, experiment, mesh, stage="decode", batch_size=12, context=128)


def test_the_largest_batch_lies_on_the_line_of_two_plans(trained):
    def plan(rows, peak):
        used = Memory(0, 0, peak, 0, peak, 1000, True)
        return dataclasses.replace(trained["v5e:2x2"], rows=rows, memory=used)

    assert largest_batch((plan(8, 200), plan(16, 280))) == 88  # 120 are fixed, ten a row
    assert largest_batch((plan(16, 280), plan(8, 200))) == 88
    with pytest.raises(ValueError, match="does not grow"):
        largest_batch((plan(8, 200), plan(16, 200)))
