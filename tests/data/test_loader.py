"""Batches reproduced, resumed and sharded, over streams whose content is known in closed form."""

import dataclasses

import grain
import numpy as np
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.data.digits import Digits
from vlm_jax.data.loader import batch_at, batches, join
from vlm_jax.data.source import Tools
from vlm_jax.types import Batch, CellBatch


def row(index: int, images: bool = True, length: int = 3) -> Batch:
    """A batch of one that says which element it is."""
    filled = np.full((1, length), index, np.int32)
    pixels = np.full((1, 1, 2, 2, 1), index, np.float32) if images else None
    return Batch(filled, filled + 1, filled + 2, filled + 3, pixels, targets=filled + 4)


def indices(batch: Batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


STREAM = grain.MapDataset.range(23).map(row)


def test_a_batch_joins_consecutive_elements_and_keeps_absent_fields():
    batch = batch_at(STREAM, 4, 2)
    assert isinstance(batch, Batch)
    np.testing.assert_array_equal(batch.tokens, [[8] * 3, [9] * 3, [10] * 3, [11] * 3])
    np.testing.assert_array_equal(batch.targets, batch.tokens + 4)
    assert batch.images.shape == (4, 1, 2, 2, 1)
    assert batch.images[:, 0, 0, 0, 0].tolist() == [8.0, 9.0, 10.0, 11.0]
    assert batch.loss_weights is None


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_the_iterator_yields_what_batch_at_makes(num_threads):
    read = [indices(batch) for batch in batches(STREAM, 4, num_threads=num_threads, prefetch=3)]
    assert read == [list(range(4 * step, 4 * step + 4)) for step in range(5)]  # 23 = 5 * 4 + 3: dropped
    assert read == [indices(batch_at(STREAM, 4, step)) for step in range(5)]


def test_shards_side_by_side_are_the_global_batch():
    shards = [list(batches(STREAM, 6, shards=(index,), shard_count=2)) for index in range(2)]
    assert [len(shard) for shard in shards] == [3, 3]
    for step, (first, second) in enumerate(zip(*shards, strict=True)):
        assert indices(first) + indices(second) == indices(batch_at(STREAM, 6, step))
        assert indices(second) == indices(batch_at(STREAM, 6, step, shards=(1,), shard_count=2))
    assert indices(batch_at(STREAM, 6, 1, shards=(0, 2), shard_count=3)) == [6, 7, 10, 11]


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_iterator_resumes_at_the_next_batch(num_threads):
    first = batches(STREAM, 4, num_threads=num_threads, prefetch=4)
    for _ in range(2):
        next(first)
    state = first.get_state()
    rest = [indices(batch) for batch in first]
    again = batches(STREAM, 4, num_threads=num_threads, prefetch=4)
    again.set_state(state)
    assert [indices(batch) for batch in again] == rest == [indices(batch_at(STREAM, 4, step)) for step in (2, 3, 4)]


def test_digit_pages_are_made_again_from_seed_and_step():
    tools = Tools(
        format_box=lambda box, height, width: str(box),
        read_image=lambda path: None,
        image_size=lambda path: None,
        video_size=lambda path: None,
        prepare_image=lambda image: image.astype(np.float32),
    )
    source = Digits(variants=1).open(tools)
    iterator = batches(source.train("cells", seed=3), 8, num_threads=2)
    shard = batches(source.train("cells", seed=3), 8, shards=(1,), shard_count=2)
    for step in range(3):
        batch, part = next(iterator), next(shard)
        again = batch_at(source.train("cells", seed=3), 8, step)
        assert isinstance(batch, CellBatch)
        for field in dataclasses.fields(CellBatch):
            np.testing.assert_array_equal(getattr(batch, field.name), getattr(again, field.name))
            np.testing.assert_array_equal(getattr(batch, field.name)[4:], getattr(part, field.name))
    assert batch.images.shape == (8, 1, 48, 48, 1)
    assert batch.classes.shape == (8, 4, 4)


def test_an_error_of_an_element_reaches_the_reader():
    def broken(index):
        raise ValueError(f"element {index} is broken")

    with pytest.raises(ValueError, match="element 0 is broken"):
        next(batches(grain.MapDataset.range(8).map(broken), 4))


@pytest.mark.parametrize(
    ("batch_size", "shards", "message"),
    [
        (
            5,
            2,
            r"config\.stages: a batch_size of 5 cannot .* over 2 shards; .* multiple of 2",
        ),
        (0, 1, r"config\.stages: a batch_size of 0"),
        (24, 1, r"config\.stages: the data has 23 samples, too few for a batch_size of 24"),
    ],
)
def test_a_batch_size_that_cannot_be_is_refused(batch_size, shards, message):
    with pytest.raises(ConfigError, match=message):
        batches(STREAM, batch_size, shard_count=shards)


def test_a_shard_or_step_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"shards must be one or more of \[0, 2\), got \(2,\)"):
        batches(STREAM, 4, shards=(2,), shard_count=2)
    with pytest.raises(IndexError, match="5 batches of 4, but not step 5"):
        batch_at(STREAM, 4, 5)


def test_elements_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="element 1 of the batch has other fields than element 0"):
        join([row(0), row(1, images=False)])
    with pytest.raises(ValueError, match=r"differ in shape: \[\(3,\), \(5,\)\]"):
        join([row(0), row(1, length=5)])
