"""Training rows that several samples of a release share, and rows of several lengths."""

import functools
import json

import cloudpickle
import jax
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from configs import finetune
from tests.contracts import releases
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.data.loader import batches
from vlm_jax.data.packing import TooLargeForRow
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule

from ..advice import tried

LENGTH = 160
SIZES = [(20, 40), (33, 24), (16, 16)]  # (height, width)
COUNTS = (0, 1, 3, 2, 1, 0)  # pictures of the samples; one more has a broken file


def question(number):
    """Of which one is long."""
    return f"what is {number}?" + " and more" * 7 * (COUNTS[number] == 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:200])  # with a whole header
    records: list[dict] = []
    for number, count in enumerate(COUNTS):
        said = [
            {"from": "human", "value": "<image>\n" * count + question(number)},
            {"from": "gpt", "value": "x"},
        ]
        images = {"image": [f"{index}.png" for index in range(count)]} if count else {}
        records.append({"id": str(number), "conversations": said, **images})
    records.append({"id": "broken", "image": "broken.png", "question": "what?", "answer": "y"})
    for name in ("train", "evaluation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder of a system, made once."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        releases.make(name, folder)
        return folder

    return made


def config_of(release, data, row, reducer="visionzip", budget=4):
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(release), "float32"
        config.token_budget, config.reducer.kind = budget, reducer
        config.row.update({"length": LENGTH, "images": 256, "pictures": 5, "pack": True, **row})
        config.data.train_path, config.data.evaluation_path = (
            str(data / f"{name}.jsonl") for name in ("train", "evaluation")
        )
        config.data.max_corrupt = 1
        config.stages.instruction.update({"steps": 2, "batch_size": 2, "warmup_steps": 1})
        config.loop.update({"log_every": 1})
    return config


def dataset_of(config, folder=None):
    experiment = build(config)
    stage = parse_schedule(tuple(config.schedule), config.stages)[0].stage
    return experiment, rows(experiment, stage, config.seed, folder=folder)


@pytest.mark.parametrize(("name", "images"), [("llava", 8), ("qwen2_5_vl", 256)])
def test_an_epoch_has_every_sample_once_with_its_own_loss(name, images, released, data, one_device, tmp_path):
    release = released(name)
    config = config_of(release, data, {"images": images})
    experiment = build(config)
    outcome = Trainer(config, experiment, one_device, tmp_path / "run").run()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])

    _, packed = dataset_of(config, tmp_path / "run" / "rows")
    names = sorted(path.name for path in (tmp_path / "run" / "rows").glob("*/*.npz"))
    count = int(names[0].removeprefix("00000000-").removesuffix(".npz"))  # rows of the first epoch
    whole = [packed[index] for index in range(count)]
    assert sum(int(row.segment_ids.max()) for row in whole) == len(COUNTS)  # the broken one is left out
    assert count < len(COUNTS)
    assert max(int(row.segment_ids.max()) for row in whole) > 1

    alone = vlm_jax.from_pretrained(release).with_budget(4, reducer="visionzip")
    losses, positions = [], 0
    for row in (packed[0], packed[1]):
        segments, positions = row.segment_ids[0], positions + int((row.segment_ids > 0).sum())
        for number in range(1, segments.max() + 1):
            ids = row.tokens[0][(segments == number) & (row.visual_index[0] < 0)]
            text = alone.processor.tokenizer.decode(ids.tolist())
            sample = int(text.split("what is ")[1][:1])
            sizes = [data / f"{i}.png" for i in range(COUNTS[sample])]
            content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": question(sample)}]
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
            ]
            batch = alone.processor.batch([messages], [sizes], targets=True, shape=experiment.row)  # of one program
            logits = np.float64(alone.logits(batch)[0])
            likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            learned = batch.loss_weights[0] > 0
            losses += (-likely[np.arange(len(likely)), batch.targets[0]][learned]).tolist()
    assert first["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert first["padding_share"] == pytest.approx(1 - positions / (2 * LENGTH), abs=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.params))


@pytest.mark.parametrize("pack", [True, False])
def test_hosts_share_the_batches_of_one(pack, released, data):
    row = {"images": 8, "pack": pack, "buckets": 2, "length": 200}
    config = config_of(released("llava"), data, row, "none", None)
    config.stages.instruction.batch_size = 4
    _, made = dataset_of(config)
    whole = [next(batches(made, 4, num_threads=0))]
    iterators = [batches(made, 4, shards=(index,), shard_count=2, num_threads=0) for index in range(2)]
    parts = [next(part) for part in iterators]
    for name in ("tokens", "segment_ids", "positions"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole[0], name))


def test_a_batch_has_the_length_of_its_bucket(released, data):
    row = {"images": 3, "pack": False, "buckets": 2, "length": 250}
    config = config_of(released("llava"), data, row, "none", None)
    _, made = dataset_of(config)
    lengths = set()
    for batch in range(12):
        pair = [made[2 * batch], made[2 * batch + 1]]
        longest = max(int((row.segment_ids > 0).sum()) for row in pair)
        expected = 128 if longest <= 128 else 250
        assert [row.tokens.shape[1] for row in pair] == [expected] * 2
        lengths.add(expected)
    assert lengths == {128, 250}


def test_rows_are_made_in_another_process_as_in_this_one(released, data):
    _, made = dataset_of(config_of(released("qwen2_5_vl"), data, {}))
    again = cloudpickle.loads(cloudpickle.dumps(made))  # as grain does
    np.testing.assert_array_equal(again[0].tokens, made[0].tokens)
    np.testing.assert_array_equal(again[0].images.patches, made[0].images.patches)


def test_a_sample_that_fits_no_row_is_named(data, released):
    release = released("qwen2_5_vl")
    config = config_of(release, data, {"pictures": 2})
    with pytest.raises(TooLargeForRow, match=r"train\.jsonl:2' needs 3 pictures, config\.row\.pictures is 2"):
        dataset_of(config)[1][0]
    told = tried("{visionzip} acts on every picture of a packed row; set the most pictures that a row has")
    with pytest.raises(ConfigError, match=told):
        build(config_of(release, data, {"pictures": None}))
    first = dataset_of(config_of(release, data, {"pictures": 3}))[1][0]
    assert first.images.images.counts.shape[-1] == 3
    with pytest.raises(ConfigError, match=r"config\.row\.kept: .* each of 0 drops"):
        build(config_of(release, data, {"kept": (3,)}))
