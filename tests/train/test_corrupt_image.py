"""An image of a set of files that cannot be read: skipped up to the limit, then an error that names it."""

import json
import logging

import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.train.conftest import tiny_config
from vlm_jax.build import build
from vlm_jax.data.conversations import TooManyCorruptImages
from vlm_jax.train.loop import Trainer
from vlm_jax.types import text_of


@pytest.fixture
def config(tmp_path):
    """Answers from 8 page files, of which the fifth is cut off."""
    source = build(tiny_config()).open_source()
    for name in ("train", "test"):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for index in range(8):
                sample = source.train("questions", seed=0)[index]
                Image.fromarray(sample.images[0][:, :, 0]).save(tmp_path / f"{name}{index}.png")
                texts = [text_of(message) for message in sample.messages]
                turns = list(zip(texts[::2], texts[1::2], strict=True))
                file.write(json.dumps({"id": f"page{index}", "image": f"{name}{index}.png", "turns": turns}) + "\n")
    broken = tmp_path / "train4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    config = tiny_config()
    with config.unlocked():
        config.data = ConfigDict(
            {
                "kind": "conversations",
                "train_path": str(tmp_path / "train.jsonl"),
                "evaluation_path": str(tmp_path / "test.jsonl"),
                "channels": 1,
                "max_corrupt": 0,
            }
        )
        config.schedule = ("answering",)
        del config.stages["seeing"]
        config.stages.answering.steps = 4
    return config


def train(config, mesh, workdir):
    return Trainer(config, build(config), mesh, workdir).run()


def test_over_the_limit_it_is_named(config, one_device, tmp_path):
    with pytest.raises(TooManyCorruptImages, match=r"page4(.|\n)*train4\.png"):
        train(config, one_device, tmp_path / "run")


def test_within_the_limit_it_is_skipped_and_counted_once(config, one_device, tmp_path, caplog):
    with config.unlocked():
        config.data.max_corrupt = 1
    with caplog.at_level(logging.WARNING):
        outcome = train(config, one_device, tmp_path / "run")
    assert outcome.step_seconds > 0
    warnings = [record.getMessage() for record in caplog.records if "page4" in record.getMessage()]
    assert len(warnings) == 1 and "train4.png" in warnings[0]
