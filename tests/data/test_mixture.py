"""Mixtures: shares, epochs and order, counted by hand."""

import json
import logging
from collections import Counter

import numpy as np
import pytest

from vlm_jax.config import ConfigError, parse
from vlm_jax.data import SOURCES
from vlm_jax.data.mixture import Part, mixed
from vlm_jax.data.source import Tools

TOOLS = Tools(
    format_box=lambda *a: "",
    read_image=lambda path, *, channels, max_pixels: np.zeros((2, 2, channels), np.uint8),
    image_size=lambda path, *, max_pixels: (2, 2),
    prepare_image=lambda image: image,
    video_size=lambda path, *, max_pixels: VideoSize(4, 2, 2),
)


def parts(**weights):
    """Sets of 4, 5, … elements that say where they are from."""
    return [
        Part(name, [(name, number) for number in range(4 + place)], 4 + place, weight)
        for place, (name, weight) in enumerate(weights.items())
    ]


def test_shares_are_the_weights_and_every_epoch_of_a_set_has_each_element_once():
    stream = mixed(parts(a=1.0, b=3.0), 0)
    read = [stream[index] for index in range(400)]
    assert Counter(name for name, _ in read) == {"a": 100, "b": 300}
    for name, count in (("a", 4), ("b", 5)):
        numbers = [number for of, number in read if of == name]
        epochs = [numbers[start : start + count] for start in range(0, len(numbers), count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 3
    again, other = mixed(parts(a=1.0, b=3.0), 0), mixed(parts(a=1.0, b=3.0), 1)
    assert [again[index] for index in range(400)] == read != [other[index] for index in range(400)]
    # Read in any order, an element is the same.
    assert [mixed(parts(a=1.0, b=3.0), 0)[index] for index in (399, 17)] == [read[399], read[17]]


def test_epochs_are_counted_by_set(caplog):
    stream = mixed(parts(a=1.0, b=1.0), 0, log=True)
    with caplog.at_level(logging.INFO):
        for index in range(20):  # ten of each: three epochs of four, and two of five
            stream[index]
    said = [record.getMessage() for record in caplog.records]
    assert sorted(said) == [
        *(f"config.data.a: epoch {epoch} of 4 records begins" for epoch in (1, 2, 3)),
        *(f"config.data.b: epoch {epoch} of 5 records begins" for epoch in (1, 2)),
    ]


def section(folder, **changes):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, count, key in (("long", 6, "messages"), ("short", 2, "dialog"), ("test", 1, "messages")):
        lines = [json.dumps({"id": f"{name}{index}", key: said}) for index in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = {
        "long": {"path": str(folder / "long.jsonl"), "weight": 3},
        "short": {"path": str(folder / "short.jsonl"), "columns": {"messages": "dialog"}},
    }
    paths = {"train_path": None, "evaluation_path": str(folder / "test.jsonl"), "mixture": mixture}
    return {**paths, "num_images": None, **changes}


def test_files_of_a_config_are_mixed_with_names_of_their_own(tmp_path):
    source = parse(SOURCES["conversations"], section(tmp_path), "config.data").open(TOOLS)
    stream, sized = source.train("questions", 0), source.sized("questions", 0)
    names = [stream[index].sample_id.rpartition(":")[2] for index in range(16)]
    assert Counter(name[:-1] for name in names) == {"long": 12, "short": 4}
    assert Counter(names) == {**{f"long{index}": 2 for index in range(6)}, "short0": 2, "short1": 2}
    assert [sized.samples[index].sample_id.rpartition(":")[2] for index in range(16)] == names
    assert [sized.sizes[index].sample_id.rpartition(":")[2] for index in range(16)] == names
    assert sized.epoch is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_path": "a"}, r"config\.data\.train_path: config\.data\.mixture names the training files"),
        (
            {"mixture": {"a": {"path": "b", "weight": 0}}},
            r"config\.data\.mixture\.a\.weight: expected above 0, got 0",
        ),
        (
            {"mixture": {"a": {"pth": "b"}}},
            r"config\.data\.mixture\.a\.pth: unknown or unused key; did you mean 'path'",
        ),
        ({"mixture": {"a": {"path": "b"}}, "evaluation_path": "b"}, r"evaluation_path: is mixture\.a\.path, b; use a"),
        ({"mixture": {"a": {"path": "nowhere"}}}, r"config\.data\.mixture\.a\.path: there is no file '.*nowhere'"),
        ({"max_checked": 0}, r"config\.data\.max_checked: expected at least 1, got 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_its_key(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(SOURCES["conversations"], section(tmp_path, **changes), "config.data").open(TOOLS)
