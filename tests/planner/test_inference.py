"""Steps of generation on abstract values against closed forms of the cache, and the largest batch that fits."""

import dataclasses
import functools

import jax
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.planner.inference import inference_work
from vlm_jax.planner.memory import Memory
from vlm_jax.planner.request import Request
from vlm_jax.planner.search import ROUNDS, find_largest, largest_batch
from vlm_jax.planner.settings import planned
from vlm_jax.planner.topology import PlanError
from vlm_jax.planner.training import training_work

from ..advice import tried
from ..train.test_classify import classifier
from .conftest import WIDTH, mesh_of

CONTEXT, BATCH = 128, 16


@pytest.fixture(scope="module")
def works(config):
    own, experiment = planned(config, 8)
    mesh = mesh_of(own, jax.devices())
    given = {"batch_size": BATCH, "context": CONTEXT}
    return {stage: inference_work(own, experiment, mesh, stage=stage, **given) for stage in ("prefill", "decode")}


def test_the_cache_is_in_bfloat16_over_the_rows_of_a_device(works):
    cache = works["decode"].arguments["cache"]
    key, value = cache.layers[0]
    assert key.dtype == value.dtype == "bfloat16" and key.size == value.size == 2 * BATCH * CONTEXT * WIDTH
    assert key.sharding.shard_shape(key.shape)[1] == BATCH // 8
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(works["decode"].arguments["parameters of decoder"]))


def test_a_decoded_token_multiplies_every_kernel_of_the_decoder_once(works):
    """Kaplan et al. 2020, section 2.1: two FLOPs a parameter, and attention over the whole cache."""
    kernels = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * 2 * WIDTH) + WIDTH * 26
    attention = 2 * 2 * 2 * WIDTH * (CONTEXT + 1)
    assert works["decode"].model_flops == BATCH * (2 * kernels + attention) and works["decode"].tokens == BATCH
    assert works["prefill"].tokens == BATCH * 94


def test_sizes_that_do_not_fit_are_named(config):
    own, experiment = planned(config, 8)
    mesh = mesh_of(own, jax.devices())
    with pytest.raises(ConfigError, match="--context: expected at least the prompt's 94"):
        inference_work(own, experiment, mesh, stage="decode", batch_size=8, context=10)
    with pytest.raises(
        ConfigError,
        match=tried(
            "{12} prompts cannot be divided over {8} shards (data times fsdp of config.mesh); set a multiple of {8}"
        ),
    ):
        inference_work(own, experiment, mesh, stage="decode", batch_size=12, context=128)
    assert inference_work(own, experiment, mesh, stage="decode", batch_size=16, context=128).tokens == 16


def test_a_classifier_is_planned_in_training():
    own, experiment = planned(classifier(), 8)
    mesh = mesh_of(own, jax.devices())
    told = tried("--stage={prefill}: a {Classifier} generates no text; plan --stage=train")
    with pytest.raises(ConfigError, match=told):
        inference_work(own, experiment, mesh, stage="prefill", batch_size=8, context=None)
    assert training_work(own, experiment, mesh).rows == own.stages.pairs.batch_size


CHIP, USABLE = 1024, 1008  # of a program that fits the chip's memory is known, of a refused one the compiler's limit


def of_rows(plan, rows, peak):
    used = Memory(0, 0, peak, 0, peak, CHIP if peak <= USABLE else USABLE, peak <= USABLE)
    return dataclasses.replace(plan, rows=rows, memory=used)


def test_the_largest_batch_lies_on_the_line_of_two_plans(trained):
    plan = functools.partial(of_rows, trained["v5e:2x2"])
    assert largest_batch((plan(8, 200), plan(16, 280)), 2) == 90  # 120 are fixed, ten a row
    assert largest_batch((plan(16, 280), plan(8, 200)), 16) == 80
    assert largest_batch((plan(8, 200), plan(100, 1120)), 2) == 88  # the compiler's limit
    with pytest.raises(
        PlanError,
        match=tried(
            "does not grow with the batch: {200} bytes for {8} rows, {200} for {16}; start at a larger --batch_size"
        ),
    ):
        largest_batch((plan(8, 200), plan(16, 200)), 8)


@pytest.mark.parametrize(
    ("peak", "rows"),
    [
        (lambda rows: 120 + 10 * rows, 88),
        (lambda rows: 120 + max(80, 4 * rows), 216),
        (lambda rows: 8 * (rows // 8) ** 2, 88),
        (lambda rows: 400 + (rows // 8), 4864),
    ],
    ids=["line", "padded", "square", "far"],
)
def test_the_most_rows_that_fit_are_found(config, trained, peak, rows):
    """Memory on a line, with first rows of padding, that bends, and of so many rows that a step is a fiftieth."""
    asked = []

    def make(request):
        asked.append(request)
        return of_rows(trained["v5e:2x2"], request.batch_size, peak(request.batch_size))

    found = find_largest(Request(config, "v5e:2x2", "decode", batch_size=8), make)
    assert rows * 0.98 <= found.rows <= rows and len(asked) <= ROUNDS + 2
    assert not asked[-1].quick and all(one.quick for one in asked[:-1])


def test_fewer_rows_are_planned_where_the_program_in_full_takes_more(config, trained):
    def make(request):
        more = 0 if request.quick else 25
        return of_rows(trained["v5e:2x2"], request.batch_size, 120 + 10 * request.batch_size + more)

    request = Request(config, "v5e:2x2", "decode", batch_size=2)
    assert find_largest(request, make).rows == 86
    assert find_largest(request.changed(quick=True), make).rows == 88  # for the memory alone
    told = tried("{2000} rows do not fit, {19112} bytes too much; start at a smaller --batch_size")
    with pytest.raises(PlanError, match=told):
        find_largest(request.changed(batch_size=2000), make)
