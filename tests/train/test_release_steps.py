"""Steps of a release: packed, over a mesh with a ring and in two microbatches, the numbers are those of the batch."""

import numpy as np
import pytest

from configs import finetune
from tests.contracts import releases
from vlm_jax.build import build
from vlm_jax.data.loader import join
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.types import RowShape, Sample, Turn, dialogue

from .stepping import assert_close, steps

SIZES = [(20, 40), (33, 24), (16, 16)]  # (height, width)
PICTURES = ((0, 1), (2,), (), (1,))  # of each conversation
TURNS = (3, 1, 2, 1)
METRICS = ("loss", "accuracy", "grad_norm")


REPEATS = 4  # of the conversations: packed, two rows for each of two shards in each of two microbatches


def samples():
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 255, (*size, 3), np.uint8) for size in SIZES]
    for number, (pictures, turns) in enumerate(REPEATS * list(zip(PICTURES, TURNS, strict=True))):
        said = [Turn(f"what is {number}?" + " and more" * turn, "x" * (turn + 1)) for turn in range(turns)]
        yield Sample(str(number), dialogue(said, num_images=len(pictures)), tuple(pixels[i] for i in pictures))


def of_steps(experiment, batch, mesh, accumulate=1):
    metrics, params, _ = steps(experiment, batch, mesh, accumulate)
    return [[line[name] for name in METRICS] for line in metrics], params


@pytest.mark.parametrize(("name", "images"), [("llava", 4), ("qwen2_5_vl", 256)])
def test_packed_sharded_and_accumulated_steps_are_those_of_the_batch(name, images, one_device, tmp_path):
    releases.make(name, tmp_path)
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(tmp_path), "float32"
        config.row.update({"length": 160, "images": images})
    experiment = build(config)
    rows = [experiment.training_row(sample) for sample in samples()]
    batch, shape = join(rows), RowShape(2 * experiment.row.length, experiment.row.images)
    whole = of_steps(experiment, batch, one_device)
    assert whole[0][0][0] - whole[0][2][0] > 0.01
    found = list(samples())
    packed = join([experiment.training_row(*pair, shape=shape) for pair in zip(found[::2], found[1::2], strict=True)])
    assert packed.segment_ids.max() == 2 and packed.loss_weights.sum() == batch.loss_weights.sum()
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, tensor=2, context=2))
    assert_close(of_steps(experiment, packed, mesh, accumulate=2), whole)
