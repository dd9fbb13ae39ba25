"""A run that starts from a release and is written back as one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from PIL import Image

import vlm_jax
from configs import base, digits_stages
from tests.golden.conftest import DATA
from vlm_jax.build import PARTS, build
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.verification import CheckpointError
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.convert import open_conversion
from vlm_jax.train.loop import Trainer

RELEASED = DATA / "internvl2_qwen2"


def section(kind, module, *solved):
    """The section of a config that makes a module."""
    given = {"kind": kind}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in ("parent", "name", "dtype", "param_dtype", *solved) or value == field.default:
            continue
        given[field.name] = dataclasses.asdict(value) if field.name == "rope" else value
    return given


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "orbax"
    open_conversion(RELEASED, FAMILIES).write(folder)
    return folder


@pytest.fixture(scope="module")
def released():
    return vlm_jax.from_pretrained(RELEASED)


@pytest.fixture
def config(released, tmp_path):
    words = ["<pad>", "<bos>", "<eos>", "<image>", "<unk>", "what", "red"]
    backend = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(backend)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    for name in ("train", "evaluation"):
        record = {"id": name, "image": "red.png", "question": "what", "answer": "red"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    config, module = base.get_config(), released.module
    rows, cols = module.encoder.grid(*module.encoder.image_size)
    config.token_budget = rows * cols // module.connector.factor**2
    config.encoder = ConfigDict(section("vit", module.encoder))
    config.connector = ConfigDict(section("pixel_shuffle", module.connector, "features", "factor"))
    config.decoder = ConfigDict(section("transformer", module.decoder))
    config.data = ConfigDict({"kind": "conversations"})
    config.data.update({f"{name}_path": str(tmp_path / f"{name}.jsonl") for name in ("train", "evaluation")})
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    config.processor.update(
        {"image_size": module.encoder.image_size, "tokenizer": str(tmp_path / "tokenizer.json"), **statistics}
    )
    config.stages = ConfigDict({"instruction": digits_stages.instruction()})
    config.stages.instruction.update({"steps": 2, "warmup_steps": 1, "batch_size": 2})
    config.stages.instruction.learning_rates = ConfigDict({"connector": 1e-2})
    config.schedule = ("instruction",)
    return config.lock()


def test_from_a_release_to_a_release(config, released, orbax, one_device, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(config, build(config), one_device, run, init_from=orbax, init_parts=PARTS)
    start = trainer._first_state(trainer._spans[0]).params
    jax.tree.map(np.testing.assert_array_equal, start, dict(released.params))
    trained = trainer.run().params
    open_conversion(RELEASED, FAMILIES, run=run).write(tmp_path / "out")
    loaded = vlm_jax.from_pretrained(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), trained)
    before, after = open_checkpoint(RELEASED), open_checkpoint(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if not np.array_equal(before[key][...], after[key][...])}
    assert changed and all(key.startswith("mlp1.") for key in changed)  # the connector alone was trained


def test_a_release_of_other_sizes_is_refused(config, orbax, one_device, tmp_path):
    with config.unlocked():
        config.decoder.vocab_size = 1000
    trainer = Trainer(config, build(config), one_device, tmp_path / "run", init_from=orbax, init_parts=PARTS)
    message = (
        r"params is of another model:\n  it has decoder/embedding/embedding \(150, \d+\), expected \(1000, \d+\)\n"
    )
    with pytest.raises(CheckpointError, match=message):
        trainer._first_state(trainer._spans[0])
