"""Plans of packed rows: against brute force and closed forms, reproduced, cached, on several hosts."""

import itertools
import logging
import os
import pickle
import random
import threading
from collections import Counter

import grain
import numpy as np
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.data import packing
from vlm_jax.data.loader import batch_at, batches
from vlm_jax.data.packing import (
    PackedRows,
    StalePlan,
    TooLargeForRow,
    bucket_of,
    buckets,
    fingerprint,
    pack_window,
)
from vlm_jax.types import Batch, Load, RowShape

SHAPE = RowShape(20, 4)


def load_of(element: int) -> Load:
    """A load that looks drawn, of the element alone."""
    drawn = random.Random(element)
    return Load(drawn.randint(1, 12), drawn.randint(0, 2))


class Measure:
    """`load_of`, and which elements it was asked for."""

    def __init__(self):
        self.elements: Counter[int] = Counter()

    def __call__(self, element: int) -> Load:
        self.elements[element] += 1
        return load_of(element)


def plan(measure=load_of, **options) -> PackedRows:
    return PackedRows(measure, **{"shape": SHAPE, "seed": 3, "epoch": 50, "window": 16, **options})


def total(loads) -> tuple[int, ...]:
    return tuple(np.sum([(load.length, load.images, *load.kept) for load in loads], axis=0).tolist())


def best_fit_decreasing(loads, shape) -> list[tuple[int, ...]]:
    """The definition, with every row looked at for every load."""
    size = (shape.length, shape.images, *shape.kept)
    rows: list[list[int]] = []
    for index in sorted(range(len(loads)), key=lambda i: (-loads[i].length, -loads[i].images, i)):
        with_it = [total([loads[i] for i in (*row, index)]) for row in rows]
        fit = [row for row, used in enumerate(with_it) if all(u <= s for u, s in zip(used, size, strict=True))]
        if fit:
            rows[max(fit, key=lambda row: (with_it[row][0], -row))].append(index)
        else:
            rows.append([index])
    return [tuple(sorted(row)) for row in rows]


def fewest_rows(lengths, capacity) -> int:
    """By trial of every assignment; each load goes into a row in use or into the next one."""

    def trial(rest, used):
        if not rest:
            return len(used)
        shared = [
            trial(rest[1:], [*used[:row], length + rest[0], *used[row + 1 :]])
            for row, length in enumerate(used)
            if length + rest[0] <= capacity
        ]
        return min([*shared, trial(rest[1:], [*used, rest[0]])])

    return trial(lengths, [])


@pytest.mark.parametrize("shape", [RowShape(20, 4), RowShape(20, 100), RowShape(20, 5, (12, 9))])
def test_windows_are_packed_by_best_fit_decreasing_in_every_capacity(shape):
    drawn = random.Random(0)
    for _ in range(20):
        loads = []
        for _ in range(60):
            length = drawn.randint(1, 12)
            kept = [drawn.randint(0, length * 3 // 4)] if shape.kept else []
            kept += [drawn.randint(0, kept[0])] if shape.kept else []
            loads.append(Load(length, drawn.randint(0, min(5, shape.images)), tuple(kept)))
        assert pack_window(loads, shape) == best_fit_decreasing(loads, shape)


def test_rows_are_at_most_half_more_than_the_fewest():
    # Source: Simchi-Levi (1994), "New worst-case results for the bin-packing problem": 3/2 for best fit decreasing.
    drawn = random.Random(1)
    for _ in range(10):
        lengths = [drawn.randint(1, 9) for _ in range(7)]
        rows = pack_window([Load(length, 0) for length in lengths], RowShape(10, 0))
        assert sorted(itertools.chain(*rows)) == list(range(7))
        assert 2 * len(rows) <= 3 * fewest_rows(lengths, 10)


def test_packing_in_closed_form():
    # 6 + 4 fills a row; 5 is alone, since 5 + 4 leaves no length for the other 5.
    assert pack_window([Load(n, 0) for n in (5, 4, 6)], RowShape(10, 1)) == [(1, 2), (0,)]
    # Length would let all share a row, images two of them, positions after the drop one.
    loads = [Load(2, 1, (2,)) for _ in range(4)]
    assert len(pack_window(loads, RowShape(8, 4, (8,)))) == 1
    assert len(pack_window(loads, RowShape(8, 2, (8,)))) == 2
    assert len(pack_window(loads, RowShape(8, 2, (3,)))) == 4
    assert pack_window([], RowShape(8, 2)) == []


def test_what_cannot_be_read_is_in_no_row():
    assert pack_window([Load(0, 0), Load(6, 0), Load(4, 1), Load(0, 0)], RowShape(10, 1)) == [(1, 2)]
    rows = plan(lambda element: Load(10 if element % 2 else 0, 0), epoch=8, repeat=False)
    assert sorted(itertools.chain(*(rows[index] for index in range(len(rows))))) == [1, 3, 5, 7]
    with pytest.raises(ConfigError, match=r"config\.data: expected samples that can be read, got none in an epoch"):
        plan(lambda element: Load(0, 0))[0]


def test_samples_that_fit_in_no_row_are_named_together_with_the_key():
    loads = [Load(20, 4, (9,)), Load(21, 4, (9,)), Load(5, 7, (3,)), Load(20, 1, (10,))]
    with pytest.raises(TooLargeForRow) as caught:
        pack_window(loads, RowShape(20, 4, (9,)), "sample '{}'".format)
    lines = str(caught.value).split("\n")
    assert lines[1:4] == [
        "  sample '1' needs 21 positions, config.row.length is 20",
        "  sample '2' needs 7 tiles or patches, config.row.images is 4",
        "  sample '3' needs 10 positions after drop 1, config.row.kept is 9",
    ]
    assert isinstance(caught.value, ConfigError)
    with pytest.raises(TooLargeForRow, match=r"sample 33 needs 21 positions, config\.row\.length is 20"):
        plan(lambda element: Load(21 if element == 33 else 1, 0), name_of="sample {}".format)[20]
    with pytest.raises(ValueError, match=r"element 0: measured with 1 drops .* the row has 0"):
        pack_window([Load(1, 0, (1,))], RowShape(4, 1))


@pytest.mark.parametrize(
    ("options", "spans"),
    [
        # An epoch of 50 in windows of at most 16: four, of 12, 13, 12 and 13.
        ({"epoch": 50, "window": 16}, [(0, 12), (12, 25), (25, 37), (37, 50), (50, 62), (62, 75)]),
        ({"epoch": 5, "window": 16}, [(0, 5), (5, 10), (10, 15)]),
        ({"epoch": None, "window": 16}, [(0, 16), (16, 32), (32, 48)]),
    ],
)
def test_every_element_is_in_one_row_of_its_window_and_fits(options, spans):
    rows = plan(**options)
    row = 0
    for first, last in spans:
        expected = best_fit_decreasing([load_of(element) for element in range(first, last)], SHAPE)
        read = [rows[row + place] for place in range(len(expected))]
        # The same rows as by the definition, in another order.
        assert sorted(read) == sorted(tuple(first + index for index in indices) for indices in expected)
        for place, elements in enumerate(read):
            load = total([load_of(element) for element in elements])
            (listed,) = rows.loads([row + place])
            assert (listed.length, listed.images) == load
            assert load[0] <= 20
            assert load[1] <= 4
        row += len(expected)


def test_long_examples_are_not_read_first_and_the_order_is_that_of_seed_and_window():
    def rows_of_window(seed, window):
        rows = PackedRows(lambda element: Load(20 - element % 20, 0), SHAPE, seed=seed, epoch=20)
        first = 11 * window  # 20; 19 + 1; ...; 11 + 9; 10: eleven rows an epoch
        return [tuple(element % 20 for element in rows[first + place]) for place in range(11)]

    orders = [rows_of_window(seed, window) for seed in (0, 1) for window in (0, 1)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    longest = [min(row) for row in orders[0]]
    assert longest != sorted(longest)
    assert rows_of_window(0, 1) == orders[1]


def test_a_finite_stream_has_as_many_rows_as_its_windows_and_no_more():
    spans = [(0, 12), (12, 25), (25, 37), (37, 50)]
    count = sum(len(best_fit_decreasing([load_of(e) for e in range(*span)], SHAPE)) for span in spans)
    rows = plan(repeat=False)
    assert len(rows) == count
    assert sorted(itertools.chain(*(rows[row] for row in range(count)))) == list(range(50))
    with pytest.raises(IndexError, match=rf"the data has {count} rows, but not row {count}"):
        plan(repeat=False)[count]
    with pytest.raises(IndexError, match="expected a row index of at least 0, got -1"):
        rows[-1]


def as_batch(elements: tuple[int, ...]) -> Batch:
    row = np.array([[*elements, *[-1] * (20 - len(elements))]], np.int32)
    return Batch(row, row, row, row)


def test_one_two_and_four_hosts_read_the_same_rows_and_make_a_step_again():
    whole = plan()
    expected = [[whole[8 * step + place] for place in range(8)] for step in range(4)]
    for hosts in (1, 2, 4):
        # Every host plans for itself.
        streams = [grain.MapDataset.source(plan()).map(as_batch) for _ in range(hosts)]
        read = [
            batches(stream, 8, shards=(index,), shard_count=hosts, num_threads=2)
            for index, stream in enumerate(streams)
        ]
        for step in range(4):
            tokens = np.concatenate([next(part).tokens for part in read])
            assert [tuple(row[row >= 0].tolist()) for row in tokens] == expected[step]
    again = batch_at(grain.MapDataset.source(pickle.loads(pickle.dumps(plan()))).map(as_batch), 8, 3)
    assert [tuple(row[row >= 0].tolist()) for row in again.tokens] == expected[3]


def test_a_million_samples_start_with_one_window_and_resume_without_measuring_what_was_read(tmp_path):
    options = {"epoch": 1_000_000, "window": 64, "folder": tmp_path, "fingerprint": "data"}
    measure = Measure()
    rows = plan(measure, **options)
    assert len(rows) == 1 << 48
    rows[0]
    assert len(measure.elements) == 64
    expected = [rows[row] for row in range(200)]
    assert set(measure.elements.values()) == {1}
    resumed = Measure()
    rows = plan(resumed, **options)
    assert [rows[row] for row in reversed(range(200))] == expected[::-1]
    assert not resumed.elements


def test_a_plan_begun_anywhere_measures_up_to_there_once_and_keeps_few_windows_in_memory(tmp_path):
    measure = Measure()
    rows = plan(measure, folder=tmp_path, fingerprint="data")
    rows[100]
    # Windows before the row were measured, since nothing told their number of rows; none after it was.
    assert sorted(measure.elements) == list(range(max(measure.elements) + 1))
    assert set(measure.elements.values()) == {1}
    other = plan()
    assert [rows[row] for row in range(101)] == [other[row] for row in range(101)]
    assert set(measure.elements.values()) == {1}
    assert len(rows._plans) == packing.WINDOWS_IN_MEMORY


def test_what_a_kill_leaves_is_passed_over_and_missing_or_broken_files_are_made_again(tmp_path, caplog):
    options = {"folder": tmp_path, "fingerprint": "data"}
    whole = plan(**options)
    expected = [whole[row] for row in range(40)]
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    content = [file.read_bytes() for file in files]
    files[1].unlink()
    files[2].write_bytes(content[2][:100])
    files[3].write_bytes(content[3][:-30] + bytes(30))
    (folder / f".{files[1].name}.0123").write_bytes(content[1][:50])  # half written, never renamed
    measure = Measure()
    rows = plan(measure, **options)
    with caplog.at_level(logging.WARNING):
        assert [rows[row] for row in range(40)] == expected
    assert sorted(measure.elements) == list(range(12, 50))  # windows 1, 2 and 3
    assert sum("cannot be read and is recomputed" in record.getMessage() for record in caplog.records) == 2
    assert [file.read_bytes() for file in files] == content


def test_a_write_that_is_killed_leaves_no_file_that_is_read(tmp_path, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    options = {"folder": tmp_path, "fingerprint": "data"}
    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        plan(**options)[0]
    monkeypatch.undo()
    measure = Measure()
    assert plan(measure, **options)[0] == plan()[0]
    assert sorted(measure.elements) == list(range(12))


def test_without_a_folder_that_can_be_written_rows_are_the_same(tmp_path, caplog):
    (tmp_path / "rows").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert plan(folder=tmp_path / "rows", fingerprint="data")[0] == plan()[0]
    assert "cannot be written" in caplog.text


def test_processes_that_share_a_folder_write_the_same_files_and_read_each_others(tmp_path):
    options = {"folder": tmp_path, "fingerprint": "data"}
    other = plan()
    expected = [other[row] for row in range(30)]
    found: dict[int, list] = {}
    plans = [plan(**options) for _ in range(4)]

    def read(host):
        found[host] = [plans[host][row] for row in range(30)]

    threads = [threading.Thread(target=read, args=(host,)) for host in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[host] for host in range(4)] == [expected] * 4
    (folder,) = tmp_path.iterdir()
    assert len({file.name.split("-")[0] for file in folder.iterdir()}) == len(list(folder.iterdir()))
    # One that began before a window was written finds it all the same.
    measure = Measure()
    early = plan(measure, **options)
    early[0]
    for row in range(30, 60):
        plans[0][row]
    assert [early[row] for row in range(60)] == [other[row] for row in range(60)]
    assert not measure.elements


def test_other_data_another_seed_or_another_shape_has_files_of_its_own(tmp_path):
    for options in ({}, {"fingerprint": "other"}, {"seed": 4}, {"shape": RowShape(24, 4)}, {"window": 10}):
        measure = Measure()
        plan(measure, **{"folder": tmp_path, "fingerprint": "data", **options})[0]
        assert measure.elements
    assert len(list(tmp_path.iterdir())) == 5


def test_data_that_changed_under_one_fingerprint_is_an_error(tmp_path):
    options = {"folder": tmp_path, "fingerprint": "data"}
    plan(**options)[0]
    (folder,) = tmp_path.iterdir()
    (file,) = folder.iterdir()
    file.unlink()
    file.write_bytes(b"")
    with pytest.raises(StalePlan, match=r"window 0 has 12 rows, but .* remove the folder"):
        plan(lambda element: Load(20, 0), **options)[0]
    (folder / "00000000-99.npz").write_bytes(b"")
    with pytest.raises(StalePlan, match=r"window 0 has .* rows; remove the folder"):
        plan(**options)[0]


def test_fingerprints_are_those_of_values_not_of_their_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_buckets_are_parts_of_the_length_rounded_up():
    shape = RowShape(2000, 8, (1000,))
    assert buckets(shape, 1) == (shape,)
    # 500 and 1000 and 1500, up to multiples of 128; after the drop, half of each.
    expected = [(512, 256), (1024, 512), (1536, 768), (2000, 1000)]
    assert [(s.length, *s.kept) for s in buckets(shape, 4)] == expected
    assert {s.images for s in buckets(shape, 4)} == {8}
    assert buckets(RowShape(100, 2), 4) == (RowShape(100, 2),)
    assert [s.length for s in buckets(RowShape(100, 2), 3, multiple=1)] == [34, 67, 100]
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        buckets(shape, 0)


def test_a_batch_takes_the_smallest_bucket_that_holds_all_its_rows():
    shapes = buckets(RowShape(16, 3, (8,)), 4, multiple=1)  # 4, 8, 12, 16; 2, 4, 6, 8
    assert bucket_of([Load(4, 3, (2,)), Load(1, 0, (1,))], shapes).length == 4
    assert bucket_of([Load(4, 0, (2,)), Load(5, 0, (2,))], shapes).length == 8
    assert bucket_of([Load(4, 0, (5,))], shapes).length == 12
    with pytest.raises(ValueError, match="fit in none"):
        bucket_of([Load(17, 0, (5,))], shapes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epoch": 0}, ConfigError, "at least 1 sample, got 0"),
        ({"window": 0}, ValueError, "window and num_threads must be at least 1, got 0"),
        ({"epoch": None, "repeat": False}, ValueError, "needs its number of elements as epoch"),
        ({"folder": "rows"}, ValueError, "needs a fingerprint"),
    ],
)
def test_settings_that_make_no_plan_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        plan(**options)
