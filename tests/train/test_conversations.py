"""A release trained on a LLaVA JSON file whose samples have 0, 1 and 2 pictures, and a video."""

import json
import logging

import av
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from configs import finetune
from tests.contracts import releases
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule
from vlm_jax.types import Sample

COUNTS = (0, 1, 2, 1, 0, 2)  # pictures of the samples
SIZE = (28, 56)  # (height, width)


def write_video(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        for value in range(8):
            pixels = np.full((*SIZE, 3), 30 * value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(draw.integers(0, 255, (*SIZE, 3), np.uint8)).save(folder / f"{number}.png")
    write_video(folder / "clip.mp4")
    records = []
    for number, count in enumerate(COUNTS):
        question = "<image>\n" * count + f"what is {number}?"
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}]
        if not number:
            said[1]["weight"] = 1.0  # is passed on
        images = [f"{index}.png" for index in range(count)]
        given = {} if not count else {"image": images[0] if count == 1 else images}
        records.append({"id": str(number), "conversations": said, "model": "m", **given})
    (folder / "train.json").write_text(json.dumps(records, indent=1))
    (folder / "evaluation.json").write_text(json.dumps(records[:2]))
    said = [{"from": "human", "value": "<video>\nwhat moves?"}, {"from": "gpt", "value": "x"}]
    (folder / "clips.json").write_text(json.dumps([*records[:1], {"video": "clip.mp4", "conversations": said}]))
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    releases.make("qwen2_5_vl", folder)
    path = folder / "chat_template.jinja"
    video = "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\n{% else %}{{ c['text'] }}"
    said = path.read_text()
    assert said.count("\n{% else %}{{ c['text'] }}") == 1
    path.write_text(said.replace("\n{% else %}{{ c['text'] }}", "\n" + video))
    limits = {"size": {"shortest_edge": 256, "longest_edge": 2048}, "patch_size": 4, "merge_size": 2}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(limits))
    return folder


def config_of(release, data, train="train.json"):
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(release), "float32"
        config.row.update({"length": 200, "images": 256, "pack": True})
        config.data.train_path, config.data.evaluation_path = str(data / train), str(data / "evaluation.json")
        config.stages.instruction.update({"steps": 3, "batch_size": 1, "warmup_steps": 1})
        config.loop.update({"log_every": 1})
    return config


def test_mixed_samples_take_steps_and_other_keys_are_named(release, data, one_device, tmp_path, caplog):
    config = config_of(release, data)
    with caplog.at_level(logging.INFO):
        outcome = Trainer(config, build(config), one_device, tmp_path / "run").run()
    assert outcome.step_seconds > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    said = [record.getMessage() for record in caplog.records]
    assert (
        sum("train.json: keys that no schema has are ignored, with their numbers: model (6)" in one for one in said)
        == 1
    )
    assert sum("config.data.train_path: epoch 1 of 6 records begins" in one for one in said) == 1


def test_a_video_takes_its_places_of_a_row(release, data):
    config = config_of(release, data, "clips.json")
    experiment = build(config)
    stage = parse_schedule(tuple(config.schedule), config.stages)[0].stage
    row = rows(experiment, stage, 0)[0]
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what moves?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
    ]
    alone = vlm_jax.from_pretrained(release).processor(messages, videos=[data / "clip.mp4"], targets=True)
    (segment,) = {int(number) for number in row.segment_ids[row.visual_index >= 0]}
    assert int(row.segment_ids.max()) == 2
    place = row.segment_ids == segment
    for name in ("tokens", "positions", "visual_index", "targets", "loss_weights"):
        np.testing.assert_array_equal(getattr(row, name)[place], getattr(alone, name)[alone.segment_ids > 0])
    count = int((alone.images.segment_ids > 0).sum())
    np.testing.assert_array_equal(row.images.patches[0, :count], alone.images.patches[0, :count])


def test_faults_of_the_data_are_named_before_the_workdir_is_claimed(release, data, one_device, tmp_path):
    (data / "bad.json").write_text('[{"conversations": [{"from": "human", "value": "q"}]}]')
    config = config_of(release, data, "bad.json")
    with pytest.raises(MalformedRecords, match=r"bad\.json\[0\]: conversations: expected alternating"):
        Trainer(config, build(config), one_device, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_learn_the_turns_that_the_config_names(release, data):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what is 0?"}]},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "and 1?"}]},
        {"role": "assistant", "content": "yz"},
    ]
    processor, counts = vlm_jax.from_pretrained(release).processor, []
    for turns in ("all", "last"):
        config = config_of(release, data)
        with config.unlocked():
            config.row.update({"turns": turns})
        row = build(config).training_row(Sample("one", tuple(messages)))
        alone = processor(messages, targets=True, turns=turns)
        learned = row.loss_weights[0] > 0
        assert row.targets[0][learned].tolist() == alone.targets[0][alone.loss_weights[0] > 0].tolist()
        counts.append(int(learned.sum()))
    assert 0 < counts[1] < counts[0]  # without the first answer and its end token
    with config.unlocked():
        config.row.update({"turns": "all", "as_released": True})
    with pytest.raises(TokenizerError, match=r"no token '<\|im_end\|>'"):  # that Qwen2.5-VL's own code looks for
        build(config).training_row(Sample("one", tuple(messages)))
    with config.unlocked():
        config.row.update({"turns": "first", "as_released": False})
    with pytest.raises(ConfigError, match=r"config\.row\.turns: expected one of 'all', 'last', got 'first'"):
        build(config)
