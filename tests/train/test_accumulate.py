"""Gradients accumulated over microbatches are those of the whole batch."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.data.loader import join
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.loop import Trainer
from vlm_jax.train.workdir import read_lines
from vlm_jax.types import Batch, Sample, Turn, dialogue

from ..advice import tried
from .conftest import tiny_config
from .stepping import assert_close, steps

PACKED = {
    "kind": "qwen_vit",
    "patch_size": 6,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 16,
    "window_size": 24,
    "full_layers": (1,),
}
SIZES = [(24, 24), (60, 17), (6, 31), (30, 12)]  # pixels
LEARNED = (1000, 1, 3, 0)  # the most learned tokens of a row


def experiment_of(*, packed):
    config = tiny_config()
    with config.unlocked():
        if packed:
            config.token_budget = 12
            config.encoder, config.connector = ConfigDict(PACKED), ConfigDict({"kind": "concat"})
            config.processor.image_size = None
        config.schedule = ("answering",)
        del config.stages["seeing"]
    return build(config)


def batch_of(experiment, size, *, packed) -> Batch:
    """Rows with very different numbers of learned tokens."""
    rows = []
    for number in range(size):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number % 4 if packed else 0], 1), np.uint8)
        messages = dialogue([Turn("count 7", "2")] * 5, num_images=1)
        row = experiment.training_row(Sample(str(number), messages, (pixels,), "count"))
        weights = row.loss_weights * (np.cumsum(row.loss_weights, axis=1) <= LEARNED[number % 4])
        rows.append(dataclasses.replace(row, loss_weights=weights.astype(np.float32)))
    return join(rows)


def temporaries(program):
    """Bytes of one device."""
    return program.memory_analysis().temp_size_in_bytes


def test_four_microbatches_are_the_batch_of_four(one_device):
    experiment = experiment_of(packed=False)
    batch = batch_of(experiment, 4, packed=False)
    counts = np.asarray(batch.loss_weights).sum(axis=1)
    assert counts.tolist() == [10, 1, 3, 0]
    whole, params, large = steps(experiment, batch, one_device, 1)
    parts, accumulated, small = steps(experiment, batch, one_device, 4)
    assert_close(parts, whole)
    assert_close(accumulated, params)
    assert temporaries(small) < 0.4 * temporaries(large)
    # By the definition of a mean over tokens, from each row alone; the mean of the rows' means is another number.
    alone = [jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch) for row in range(4)]
    losses = np.asarray([steps(experiment, row, one_device, 1, count=1)[0][0]["loss"] for row in alone])
    assert parts[0]["loss"] == pytest.approx((losses * counts).sum() / counts.sum(), abs=1e-5)
    assert abs(parts[0]["loss"] - losses[:3].mean()) > 0.01


def test_devices_keep_their_rows_and_give_the_same_numbers(one_device):
    experiment = experiment_of(packed=True)
    batch = batch_of(experiment, 16, packed=True)
    assert np.asarray(batch.loss_weights).sum(axis=1).tolist() == [10, 1, 3, 0] * 4
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    whole, params, large = steps(experiment, batch, one_device, 1)
    parts, accumulated, program = steps(experiment, batch, mesh, 4)
    assert_close(parts, whole)
    assert_close(accumulated, params)
    assert temporaries(program) < temporaries(large) / 16  # one of four microbatches of one of four shards


def test_a_run_accumulates_in_every_stage(config, one_device, tmp_path):
    def lines(name, accumulate):
        with config.unlocked():
            config.stages.seeing.accumulate, config.stages.answering.accumulate = accumulate
            for label in config.stages:
                config.stages[label].update({"steps": 2, "warmup_steps": 0})
            config.optimizer.epsilon = 1e-3
        Trainer(config, build(config), one_device, tmp_path / name).run()
        kept = ("loss", "accuracy", "box_l1", "padding_share", "grad_norm")
        lines = read_lines(epath.Path(tmp_path / name / "metrics.jsonl"))
        return [{key: line[key] for key in kept if key in line} for line in lines]

    whole, parts = lines("whole", (1, 1)), lines("parts", (2, 8))
    assert len(whole) == 4 and "box_l1" in whole[0] and "padding_share" in whole[3]
    assert_close(parts, whole)


@pytest.mark.parametrize(
    ("accumulate", "message"),
    [
        (3, r"config\.stages\.seeing\.accumulate: expected a divisor of the batch_size of 8, got 3"),
        (0, r"config\.stages\.seeing\.accumulate: expected at least 1, got 0"),
        (4, tried("microbatches of {2} rows (batch_size over accumulate) cannot be divided over {4} shards")),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(config, tmp_path, accumulate, message):
    with config.unlocked():
        config.stages.seeing.accumulate = accumulate
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    with pytest.raises(ConfigError, match=message):
        Trainer(config, build(config), mesh, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with config.unlocked():
        config.stages.seeing.batch_size, config.stages.seeing.accumulate = 4 * max(accumulate, 1), max(accumulate, 1)
    assert Trainer(config, build(config), mesh, tmp_path / "run").num_steps == 12
