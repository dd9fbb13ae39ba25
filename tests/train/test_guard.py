"""Steps that are not good: which they are, that they change nothing, and how they are run again."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.sharding.rules import distribute
from vlm_jax.train import loop, replay
from vlm_jax.train.guard import FEWEST, Bounds, GuardSettings, first_recent, judged
from vlm_jax.train.loop import Diverged, Trainer
from vlm_jax.train.workdir import read_lines

from ..advice import tried

STEPS = 6


@pytest.mark.parametrize("bounds", [Bounds(), Bounds(loss=2.0), Bounds(grad_norm=3.0)])
def test_good_steps_are_those_of_a_running_median(bounds):
    draws = np.random.default_rng(0)
    losses, norms = draws.lognormal(0, 0.8, 200).astype(np.float32), draws.lognormal(1, 0.8, 200).astype(np.float32)
    losses[[20, 150]], norms[[21, 151]] = np.nan, np.inf
    losses[100:110] = 50.0  # in a row

    def step(recent, given):
        good, recent = judged(recent, *given, bounds)
        return recent, (good, recent.skipped)

    _, (found, skipped) = jax.jit(lambda: jax.lax.scan(step, first_recent(), (losses, norms)))()
    kept, expected, row = [], [], []
    for loss, norm in zip(losses, norms, strict=True):
        good = bool(np.isfinite(loss) and np.isfinite(norm))
        if good and len(kept) >= FEWEST:
            median_loss, median_norm = np.median(kept[-64:], axis=0)
            good = loss <= (bounds.loss or np.inf) * median_loss and norm <= (bounds.grad_norm or np.inf) * median_norm
        if good:
            kept.append((loss, norm))
        expected.append(good)
        row.append(0 if good else 1 + (row[-1] if row else 0))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(skipped, row)
    assert not all(expected) and any(expected)


@pytest.mark.parametrize("key", ["spike_loss", "spike_grad_norm"])
def test_a_factor_below_one_is_refused(key):
    with pytest.raises(ConfigError, match=rf"config\.loop\.{key}: expected above 1, or None, got 1.0"):
        GuardSettings(**{key: 1.0})


@pytest.fixture
def broken(config, monkeypatch):
    """Gradients that are no numbers at the steps of `at`, with a finite loss, as after an overflow."""
    at: list[int] = []
    made = loop.compile_step

    def compiled(like, batch, mesh, *, objective, **settings):
        def loss(params, batch, key, weight=1.0, reference=None):
            value, metrics = objective(params, batch, key, weight, reference)
            keys = [jax.random.fold_in(jax.random.key(config.seed), step - 1) for step in at]
            bad = jnp.any(jnp.stack([key == other for other in keys]))
            nothing = jax.tree.leaves(params["decoder"])[0] * jnp.where(bad, 0.0, 1.0) + jnp.where(bad, 0.0, 4.0)
            return value + 0.0 * jnp.sqrt(jnp.sum(jnp.abs(nothing))), metrics

        return made(like, batch, mesh, objective=loss, **settings)

    monkeypatch.setattr(loop, "compile_step", compiled)
    with config.unlocked():
        config.schedule = ("answering",)
        del config.stages["seeing"]
        config.stages.answering.steps = STEPS
        config.loop.save_every = 2
        config.loop.keep = 9
    return config, at


def run(config, mesh, workdir):
    trainer = Trainer(config, build(config), mesh, workdir)
    return trainer, trainer.run()


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("log_every", [1, 20])
def test_the_run_stops_and_saves_nothing_of_a_bad_step(broken, one_device, tmp_path, log_every):
    config, at = broken
    at += [3]
    with config.unlocked():
        config.loop.log_every = log_every
    told = tried(
        "{nan} at step {3} (stage {answering}), not finite or a spike; lower the stage's learning_rates or clip_norm"
    )
    with pytest.raises(Diverged, match=f"the norm of the gradient {told}.*config.loop.on_nonfinite=skip"):
        run(config, one_device, tmp_path)  # the next test goes on without such steps
    lines = read_lines(epath.Path(tmp_path) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and np.isfinite([line["loss"] for line in lines]).all()
    assert checkpoints(tmp_path) == [2]


def test_a_skipped_step_changes_nothing_and_can_be_run_again(broken, one_device, tmp_path):
    config, at = broken
    at += [3, 4]
    with config.unlocked():
        config.loop.on_nonfinite = "skip"
        config.loop.max_skipped = 2
    trainer, outcome = run(config, one_device, tmp_path)
    lines = read_lines(epath.Path(tmp_path) / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.params))

    # The same steps without the two, by the step alone.
    span = trainer._spans[0]
    state, key = trainer._first_state(span), jax.random.key(config.seed)
    with contextlib.closing(trainer._batches(span)) as iterator:
        batches = [distribute(next(iterator), one_device) for _ in range(STEPS)]
    with contextlib.closing(trainer._watch(span)) as watch:
        _, program = trainer._program(span, {}, batches[0], watch)
    for step, batch in enumerate(batches, 1):
        if step not in at:
            at_step = dataclasses.replace(state, step=jax.device_put(np.int32(step - 1), state.step.sharding))
            state, _ = program(at_step, batch, key)
    jax.tree.map(np.testing.assert_array_equal, state.params, dict(outcome.params))

    again = replay.load(tmp_path / "replay" / "3.npz")
    assert again.step == 2 and jax.random.key_data(again.key).tolist() == jax.random.key_data(key).tolist()
    assert jax.tree.structure(again.batch) == jax.tree.structure(batches[2])
    jax.tree.map(np.testing.assert_array_equal, again.batch, batches[2])

    with config.unlocked():
        config.loop.max_skipped = 1
    with pytest.raises(Diverged, match="at step 4"):
        run(config, one_device, tmp_path / "fewer")
    assert checkpoints(tmp_path / "fewer") == [2]
