"""Every reducer from a config: built, counted, made to answer, and one of each part trained for a step."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from tests.parameters import drawn
from tests.train.conftest import tiny_config
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.generation.engine import generate
from vlm_jax.processors.reduction import visual_places
from vlm_jax.reducers import REDUCERS
from vlm_jax.sweep.points import costs
from vlm_jax.train.objectives.next_token import NextToken

from ..advice import tried

BUDGET = 9
FIELDS = {
    "fastv": {"layer": 1},
    "dart": {"layer": 1},
    "visionzip": {"contextual_share": 0.3},
    "prumerge": {"spatial_share": 0.3},
}
KINDS = [kind for kind, cls in REDUCERS.items() if cls is not None and cls.guided_by is None]
every_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(kind, budget=BUDGET, **fields):
    """16 patches a page, a connector that keeps what it gets, two layers on either side."""
    config = tiny_config().unlock()
    config.token_budget = budget
    config.reducer = ConfigDict({"kind": kind, **FIELDS.get(kind, {}), **fields})
    config.connector = ConfigDict({"kind": "mlp"})
    config.encoder.class_token = True
    config.schedule = ("answering",)
    config.encoder.remat = config.decoder.remat = "none"  # fewer programs to compile
    return config


@functools.cache
def experiment_of(kind):
    return build(config_of(kind))


@functools.cache
def params():
    """Of every kind alike."""
    return nn.meta.unbox(drawn(experiment_of("random").boxed_shapes()))


@functools.cache
def costs_of_all_tokens():
    return costs(build(config_of("uniform_stride", 16)))


def shapes(experiment):
    """(path, shape, names) of every parameter."""
    boxed = jax.tree_util.tree_leaves_with_path(
        experiment.boxed_shapes(), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    return [(path, leaf.value.shape, leaf.names) for path, leaf in boxed]


@functools.cache
def shapes_without_a_reducer():
    return shapes(build(config_of("none", 16)))


@functools.cache
def samples():
    return list(experiment_of("random").open_source().evaluation(0))


@every_kind
def test_the_budget_is_realised(kind):
    experiment = experiment_of(kind)
    budget = experiment.system.budget
    assert budget.left == BUDGET
    in_decoder = REDUCERS[kind].reduces_in == "decoder"
    assert budget.mean == ((16 + BUDGET) / 2 if in_decoder else BUDGET)
    assert budget.entering == (16 if in_decoder else BUDGET)
    counted = costs(experiment)
    assert counted.num_visual_tokens == BUDGET and counted.mean_visual_tokens == budget.mean
    full = costs_of_all_tokens()
    assert counted.flops["prefill"] < full.flops["prefill"]
    if kind in ("tome", "downsample_image"):
        assert counted.flops["encoder"] < full.flops["encoder"]


@every_kind
def test_parameters_are_those_without_a_reducer(kind):
    assert shapes(experiment_of(kind)) == shapes_without_a_reducer()


@pytest.mark.parametrize("kind", ["tome", "visionzip", "fastv"])
def test_a_step_of_training_reaches_every_parameter(kind):
    """One kind for each part in which a reducer works; the files beside this one have the gradients of every kind."""
    experiment = experiment_of(kind)
    rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[experiment.training_row(s) for s in samples()[:2]])
    loss = NextToken().build(experiment)

    @jax.jit
    def step(params, rows):
        value, grads = jax.value_and_grad(lambda p: loss(p, rows, jax.random.key(1))[0])(params)
        return value, jax.tree.map(lambda g: jnp.abs(g).max(), grads)

    value, largest = step(params(), rows)
    assert np.isfinite(value)
    for path, grad in jax.tree_util.tree_leaves_with_path(largest):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(grad) and (grad > 0 or where.endswith("['key']['bias']")), where


@pytest.mark.parametrize("kind", ["tome", "downsample_image", "visionzip", "fastv", "pyramid_drop"])
def test_an_answer_is_that_of_whole_rows(kind):
    """The other kinds give the decoder as many tokens as visionzip; tests/contracts runs each in released systems."""
    experiment = experiment_of(kind)
    system, processor = experiment.system, experiment.system.processor
    asked = [[experiment.example(sample, targets=False)] for sample in samples()[:3]]
    prompts = processor.rows(asked, experiment.prompt, targets=False)
    answer = functools.partial(generate, system.model, params(), max_new_tokens=3)
    answers = answer(prompts).tokens
    assert len({tuple(row) for row in answers.tolist()}) > 1
    np.testing.assert_array_equal(answers, without_a_cache(system, prompts, 3))
    # Neither does an answer depend on what else is in the batch.
    swapped = jax.tree.map(lambda leaf: leaf[::-1], prompts)
    np.testing.assert_array_equal(answer(swapped).tokens[::-1], answers)


def without_a_cache(system, prompts, count):
    """The whole row again for each token; the prompt's last token ranks, as if all after it were learned."""
    length = prompts.tokens.shape[1]
    rows = {name: np.asarray(getattr(prompts, name)) for name in ("tokens", "positions", "segment_ids", "visual_index")}
    behind = np.arange(1, count + 1)[None] + rows["positions"][:, -1:]
    rows = {
        name: np.concatenate([x, np.full((len(x), count), 1 if name == "segment_ids" else -1)], 1)
        for name, x in rows.items()
    }
    rows["positions"][:, length:] = behind
    weights = np.zeros(rows["tokens"].shape, np.float32)
    weights[:, length - 1 :] = 1
    variables = {"params": {part: params()[part] for part in ("encoder", "connector", "decoder")}}
    run = jax.jit(lambda batch: system.model.apply(variables, batch))
    for place in range(length, length + count):
        batch = prompts.__class__(
            **{name: np.asarray(x, np.int32) for name, x in rows.items()},
            images=prompts.images,
            loss_weights=weights,
            targets=np.asarray(rows["tokens"], np.int32),
        )
        if prompts.places is not None:
            tokens = prompts.places.index.shape[2]
            places = visual_places(batch, [[tokens]] * len(batch.tokens), 1, tokens)
            batch = dataclasses.replace(batch, places=places)
        rows["tokens"][:, place] = np.argmax(run(batch)[:, place - 1], -1)
    return rows["tokens"][:, length:]


@pytest.mark.parametrize(
    ("kind", "encoder"), [("tome", "sam"), ("visionzip", "sam"), ("prumerge", "sam"), ("tome", "aimv2")]
)
def test_an_encoder_without_a_way_to_do_so_is_refused(kind, encoder):
    config = config_of(kind)
    small = {"patch_size": 6, "width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8}
    config.encoder = ConfigDict(
        {
            "sam": {"kind": "sam", **small, "neck_dim": 8, "global_blocks": (0,)},
            "aimv2": {"kind": "aimv2", **small},
        }[encoder]
    )
    config.token_budget = 16 if kind == "tome" else BUDGET
    told = tried(
        "does not support it (no field {}); choose another config.{encoder}.kind, such as {vit}, or another reducer"
    )
    with pytest.raises(ConfigError, match=f"{kind} works inside the encoder, but {encoder} {told}"):
        build(config)
    config.encoder = ConfigDict({"kind": "vit", **small, "num_heads": 2})
    assert build(config).budget.left == config.token_budget


@pytest.mark.parametrize(
    ("kind", "budget", "message"),
    [
        ("tome", 3, "tome cannot give 3 tokens from a 4x4 grid, because each of the encoder's 2 blocks .* feasible: 4"),
        ("fastv", 17, "fastv cannot give 17 tokens .* nearest feasible: 16"),
        ("visionzip", 0, None),
        ("divprune", 20, "nearest feasible: 16"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(kind, budget, message):
    with pytest.raises((InfeasibleBudget, ConfigError), match=message or "expected at least 1"):
        build(config_of(kind, budget))


def test_fewer_tokens_may_be_shown_than_there_are_features():
    config = config_of("pyramid_drop", 2, num_shown=4)
    config.connector.kind = "pool"
    budget = build(config).system.budget
    assert (budget.entering, budget.left, budget.mean) == (4, 2, 3.0)


def test_the_dense_head_reads_an_encoder_that_keeps_its_grid():
    config = config_of("tome")
    config.schedule = ("seeing", "answering")
    experiment = build(config)
    assert experiment.cell_reader is not None and experiment.cell_reader.encoder.merged == ()
    assert experiment.system.model.encoder.merged == (4, 3)


def test_every_kind_is_named_in_the_table_of_the_room():
    documented = set(re.findall(r"\w+", REDUCERS.__class__.__doc__ or "")) | set(
        re.findall(r"\w+", __import__("vlm_jax.reducers", fromlist=["x"]).__doc__)
    )
    assert set(REDUCERS) <= documented
