"""Tiles, clips and images of their own sizes, through one step of training and into answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from vlm_jax.build import build
from vlm_jax.data.loader import join
from vlm_jax.evals.vqa import answer_all, realised_tokens
from vlm_jax.models.vlm import flat_images
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.train.objectives import OBJECTIVES
from vlm_jax.train.state import TrainState
from vlm_jax.train.step import train_step
from vlm_jax.types import Sample, Turn

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
def system_of(kind, num_images=1, budget=12):
    config = tiny_config()
    with config.unlocked():
        config.token_budget = budget
        if kind in NATIVE:
            config.encoder, config.connector = ConfigDict(NATIVE[kind]), ConfigDict({"kind": "concat"})
            config.processor.image_size = None
        else:
            config.processor.update(VIEWED[kind])
        if num_images > 1:
            section = {"kind": "vqa_files", "train_path": "a", "evaluation_path": "b", "channels": 1}
            config.data = ConfigDict({**section, "num_images": num_images})
        config.schedule = ("answering",)
        del config.stages["seeing"]
    return build(config)


def params_of(system):
    return nn.meta.unbox(drawn(jax.eval_shape(system.init, jax.random.key(0))))


def sample(number, *sizes):
    rng = np.random.default_rng(number)
    pictures = tuple(rng.integers(0, 256, (*size, 1), np.uint8) for size in sizes)
    return Sample(f"page {number}", pictures, (Turn("count 7", "2", "count"),))


@pytest.mark.parametrize("kind", [*NATIVE, *VIEWED])
def test_a_system_learns_and_answers(kind):
    system = system_of(kind)
    samples = [sample(0, (24, 24)), sample(1, (60, 17)), sample(2, (6, 31))]
    counts = [system.processor.visual_tokens(each)[0] for each in samples]
    assert (len(set(counts)) > 1) == (kind in NATIVE)
    batch = join([system.processor(each) for each in samples])
    parts = ("encoder", "connector", "decoder")
    settings = OptimizerSettings(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0, final_scale=0.0)
    tx = adamw(settings, dict.fromkeys(parts, 1e-3), 0, 10)
    params = params_of(system)
    step = jax.jit(functools.partial(train_step, objective=OBJECTIVES["next_token"](system), tx=tx, trained=parts))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3, losses
    for path, leaf in jax.tree_util.tree_flatten_with_path(params["encoder"])[0]:
        new = functools.reduce(lambda tree, key: tree[key.key], path, state.params["encoder"])
        assert (new != leaf).any(), path  # the images reach the loss by every parameter of the encoder

    answers = answer_all(system, state.params, samples, batch_size=2)
    assert [answer.visual_tokens for answer in answers] == [(count,) for count in counts]
    realised = realised_tokens(answers)
    assert realised == {"mean": sum(counts) / 3, "max": max(counts)} and realised["max"] <= 12


@pytest.mark.parametrize("kind", NATIVE)
def test_images_of_a_sequence_are_embedded_as_each_by_itself(kind):
    system, alone = system_of(kind, num_images=2), system_of(kind)
    pair = sample(3, (24, 24), (60, 17))
    batch = system.processor.prompt(pair)
    model, params = system.model, params_of(system)
    embedded, segments, _ = jax.jit(lambda p, b: model.apply({"params": p}, b, method="embed"))(params, batch)
    assert (segments == batch.segment_ids).all()
    start = 1 + int(np.argmax(batch.tokens[0] == system.processor.tokenizer.bos_id))
    run = jax.jit(lambda p, x: model.apply({"params": p}, flat_images(x), method="visual_tokens"))
    for picture in pair.images:
        one = Sample("one", (picture,), pair.turns)
        (count,) = alone.processor.visual_tokens(one)
        tokens = run(params, alone.processor.prompt(one).images)
        assert tokens.mask.sum() == count
        np.testing.assert_allclose(embedded[0, start : start + count], tokens.tokens[0, :count], atol=1e-5)
        start += count


def test_the_answers_of_an_image_over_its_budget_are_refused(monkeypatch):
    system = system_of("naflex")
    monkeypatch.setattr(type(system.processor.views), "count", lambda self, clip: 13)
    with pytest.raises(ValueError, match=r"'page 0': its images take \(13,\) visual tokens, over the budget of 12"):
        answer_all(system, {}, [sample(0, (24, 24))], batch_size=1)
