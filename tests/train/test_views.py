"""Tiles, clips and images of their own sizes, through one step of training and into answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from vlm_jax.build import build
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.data.loader import join
from vlm_jax.evals.tally import Tally
from vlm_jax.evals.vqa import answers
from vlm_jax.leaves import flatten
from vlm_jax.models.vlm import flat_images
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.train.objectives.next_token import NextToken
from vlm_jax.train.state import TrainState
from vlm_jax.train.step import train_step
from vlm_jax.types import Sample, Turn, dialogue

from ..parameters import drawn
from .conftest import tiny_config

SIZES = {"patch_size": 6, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 16}
WINDOWS = {"window_size": 24, "full_layers": (1,)}
NATIVE = {
    "qwen_vit": {**SIZES, **WINDOWS, "kind": "qwen_vit"},
    "siglip2_navit": {**SIZES, **WINDOWS, "kind": "siglip2_navit", "table_side": 3},
    "naflex": {**SIZES, "kind": "naflex", "table_grid": (3, 3)},
}
VIEWED = {"tiles": {"tiles": (1, 2), "thumbnail": True}, "frames": {"frames": 2}}


@functools.cache
def experiment_of(kind, num_images=1, budget=12):
    config = tiny_config()
    with config.unlocked():
        config.token_budget = budget
        if kind in NATIVE:
            config.encoder, config.connector = ConfigDict(NATIVE[kind]), ConfigDict({"kind": "concat"})
            config.processor.image_size = None
        else:
            config.processor.update(VIEWED[kind])
        if num_images > 1:
            section = {"kind": "conversations", "train_path": "a", "evaluation_path": "b", "channels": 1}
            config.data = ConfigDict({**section, "num_images": num_images})
        config.schedule = ("answering",)
        del config.stages["seeing"]
    return build(config)


def params_of(experiment):
    return nn.meta.unbox(drawn(experiment.boxed_shapes()))


def sample(number, *sizes):
    rng = np.random.default_rng(number)
    pictures = tuple(rng.integers(0, 256, (*size, 1), np.uint8) for size in sizes)
    return Sample(f"page {number}", dialogue([Turn("count 7", "2")], num_images=len(sizes)), pictures, "count")


def counts_of(experiment, sample):
    return experiment.example(sample, targets=False).visual_tokens


def prompt_of(experiment, sample):
    example = experiment.example(sample, targets=False)
    return experiment.system.processor.rows([[example]], experiment.prompt, targets=False)


def evaluation(batch_size):
    return EvaluationSettings(batch_size, question_length=8, max_new_tokens=24)


# A step and answers through siglip2_navit are those through qwen_vit: the same views, in the same windows.
@pytest.mark.parametrize("kind", ["qwen_vit", "naflex", *VIEWED])
def test_a_system_learns_and_answers(kind):
    experiment = experiment_of(kind)
    samples = [sample(0, (24, 24)), sample(1, (60, 17)), sample(2, (6, 31))]
    counts = [counts_of(experiment, each)[0] for each in samples]
    assert (len(set(counts)) > 1) == (kind in NATIVE)
    batch = join([experiment.training_row(each) for each in samples])
    settings = OptimizerSettings(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0, final_scale=0.0)
    params = params_of(experiment)
    trained = frozenset(path for path, _ in flatten(params))
    tx = adamw(settings, dict.fromkeys(trained, 1e-3), 0, 10)
    step = jax.jit(functools.partial(train_step, objective=NextToken().build(experiment), tx=tx, trained=trained))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3, losses
    for path, leaf in jax.tree_util.tree_flatten_with_path(params["encoder"])[0]:
        new = functools.reduce(lambda tree, key: tree[key.key], path, state.params["encoder"])
        assert (new != leaf).any(), path  # the images reach the loss by every parameter of the encoder

    tally = Tally()
    for answer, count in zip(answers(experiment, state.params, samples, evaluation(2)), counts, strict=True):
        assert answer.visual_tokens == (count,)
        tally.add(vars(answer))
    realised = tally.realised()
    assert realised == {"mean": sum(counts) / 3, "max": max(counts)} and realised["max"] <= 12


@pytest.mark.parametrize("kind", NATIVE)
def test_images_of_a_sequence_are_embedded_as_each_by_itself(kind):
    experiment, alone = experiment_of(kind, num_images=2), experiment_of(kind)
    pair = sample(3, (24, 24), (60, 17))
    batch = prompt_of(experiment, pair)
    model, params = experiment.system.model, params_of(experiment)
    embedded, segments, *_ = jax.jit(lambda p, b: model.apply({"params": p}, b, method="embed"))(params, batch)
    assert (segments == batch.segment_ids).all()
    start = 1 + int(np.argmax(batch.tokens[0] == experiment.system.processor.tokenizer.bos_id))
    run = jax.jit(lambda p, x: model.apply({"params": p}, flat_images(x), method="visual_tokens"))
    for picture in pair.images:
        one = Sample("one", sample(0, (1, 1)).messages, (picture,))
        (count,) = counts_of(alone, one)
        tokens = run(params, prompt_of(alone, one).images)
        assert tokens.mask.sum() == count
        np.testing.assert_allclose(embedded[0, start : start + count], tokens.tokens[0, :count], atol=1e-5)
        start += count


def test_an_image_over_its_budget_is_refused():
    experiment = experiment_of("naflex")
    processor = experiment.system.processor
    larger = dataclasses.replace(processor, views=dataclasses.replace(processor.views, max_pixels=10**6))
    experiment = dataclasses.replace(
        experiment, system=dataclasses.replace(experiment.system, make_processor=lambda: larger)
    )
    message = r"'page 0' has 16 tiles or patches, over the limit of 12"
    with pytest.raises(SequenceTooLong, match=message):
        experiment.training_row(sample(0, (24, 24)))
    with pytest.raises(SequenceTooLong, match=message):
        list(answers(experiment, {}, [sample(0, (24, 24))], evaluation(1)))
