"""What messages on two towers and classifiers advise works: a fault of the config, the message, the run that begins."""

import json
import shutil

import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import finetune, finetune_towers
from tests.golden.conftest import DATA
from tests.pretrained.test_image_text import siglip_model
from vlm_jax.build import build, build_conversational
from vlm_jax.config import ConfigError
from vlm_jax.train import writers
from vlm_jax.train.check import check_config
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule

from ..advice import tried
from .conftest import tiny_config
from .test_classify import classifier
from .towers import tiny_towers

ANSWERING = {"objective": "next_token", "stream": "questions", "learning_rates": {"image": 1e-3}}
PLAIN = {"steps": 2, "batch_size": 8, "warmup_steps": 0}
PAIRS = tiny_towers(pairs={}).stages.to_dict()
CLASSES = classifier()
TEXT = tiny_towers(pairs={}).decoder.to_dict()

# (config, fault, message, the fix as further changes)
FIXES = [
    (
        tiny_towers,
        {"stages.pairs.accumulate": 2},
        tried("the loss of contrastive is over all pairs of the batch, which microbatches do not see; set it"),
        {"stages.pairs.accumulate": 1},
    ),
    (
        tiny_towers,
        {"stages.pairs.teacher": "somewhere"},
        tried("teacher: the loss distillation has one, and no other; set or remove it"),
        {"stages": PAIRS},
    ),
    (
        tiny_towers,
        {"stages": {"pairs": {**PLAIN, **ANSWERING}}},
        tried("trains a model that answers, and this is a {TwoTower}; use contrastive for two towers, classify"),
        {"stages": PAIRS},
    ),
    (
        tiny_towers,
        {"stages": CLASSES.stages.to_dict()},
        tried("classify trains a classifier, and this is a {TwoTower}; set config.decoder.kind to class_head"),
        {key: CLASSES[key] for key in ("decoder", "row", "connector", "encoder", "processor", "data", "evaluation")},
    ),
    (
        classifier,
        {"stages": PAIRS},
        tried("contrastive trains two towers, and this is a {}; set config.decoder.kind to text_tower"),
        {key: tiny_towers(pairs={})[key] for key in ("decoder", "row", "connector", "encoder", "processor", "data")},
    ),
    (
        tiny_towers,
        {"encoder.pooling": "none"},
        tried("the image tower returns no pooled vector; set its `pooling`"),
        {"encoder.pooling": "map"},
    ),
    (
        tiny_towers,
        {"encoder.projection_dim": 10},
        tried("have widths {10} (images) and {12} (texts); set projection_dim of both to one number"),
        {"encoder.projection_dim": 10, "decoder.projection_dim": 10},
    ),
    (
        tiny_towers,
        {"token_budget": 4},
        tried("config.token_budget: this model has no visual tokens to count; set it to None"),
        {"token_budget": None},
    ),
    (
        tiny_towers,
        {"token_budget_per": "tile"},
        tried("config.token_budget_per: this model has no visual tokens to count; set it to image"),
        {"token_budget_per": "image"},
    ),
    (
        tiny_towers,
        {"reducer": {"kind": "random"}},
        tried("config.reducer.kind: this model has no visual tokens to reduce; set it to none"),
        {"reducer": {"kind": "none"}},
    ),
]


def begin(make, changes, mesh, workdir):
    config = (make(pairs={}) if make is tiny_towers else make()).copy_and_resolve_references().unlock()
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = config
        for name in parents:
            section = section[name]
        with section.ignore_type():
            section[key] = ConfigDict(value) if isinstance(value, dict) else value
    check_config(config)
    return Trainer(config, build(config), mesh, workdir)


CELLS = {"connector": {"kind": "mlp"}, "token_budget": 16}
PACKED = {
    "kind": "naflex",
    "table_grid": (4, 4),
    "patch_size": 6,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 32,
}
DENSE = tiny_config().stages.to_dict()
FIXES += [
    (
        tiny_config,
        {"encoder.patch_size": 8, **CELLS, "token_budget": 9},
        tried("{(2, 2)} cells do not divide the encoder's {(3, 3)} patches; change config"),
        {"encoder.patch_size": 6, "token_budget": 16},
    ),
    (
        tiny_config,
        {"encoder": PACKED, "processor.image_size": None, **CELLS},
        tried("cells need a grid, but config.encoder.kind {naflex} packs images into a sequence; remove the stage"),
        {"stages": {"answering": DENSE["answering"]}, "schedule": ("answering",)},
    ),
]


@pytest.mark.parametrize(("make", "fault", "message", "fix"), FIXES)
def test_advice_that_is_followed_helps(one_device, tmp_path, make, fault, message, fix):
    with pytest.raises(ConfigError, match=message):
        begin(make, fault, one_device, tmp_path / "first")
    assert not (tmp_path / "first").exists()
    assert begin(make, {**fault, **fix}, one_device, tmp_path / "second").num_steps > 0


def test_a_writer_that_is_not_installed_is_left_out(one_device, tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    told = tried("{wandb} is not installed; pip install 'vlm_jax[{wandb}]', or remove it from the writers")
    with pytest.raises(ConfigError, match=told):
        begin(tiny_towers, {"loop.writers": ("wandb",)}, one_device, tmp_path)
    assert begin(tiny_towers, {"loop.writers": ()}, one_device, tmp_path).num_steps == 2


def test_two_towers_are_trained_by_the_command(one_device, tmp_path):
    told = tried("got a {TwoTower}; train it by cli.train with a config such as configs/finetune_towers.py")
    with pytest.raises(ConfigError, match=told):
        build_conversational(tiny_towers(pairs={}))
    assert begin(tiny_towers, {}, one_device, tmp_path).num_steps == 2


def release_of(name, folder):
    """A golden folder with a tokenizer, and a captioned image to train and evaluate on."""
    shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
    (folder / "spiece.model").write_bytes(siglip_model(60))
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    for file in ("train.jsonl", "evaluation.jsonl"):
        (folder / file).write_text(json.dumps({"id": "0", "image": "0.png", "caption": "the dog"}))
    return folder


def of_release(config, folder):
    config = config.copy_and_resolve_references().unlock()
    config.release, config.mesh.fsdp = str(folder), 1
    config.data.update({f"{name}_path": str(folder / f"{name}.jsonl") for name in ("train", "evaluation")})
    return config


def test_released_towers_are_trained_by_their_own_config(tmp_path):
    folder = release_of("bv_siglip", tmp_path)
    told = tried("is a {TwoTower}, which answers no questions; train it with --config=configs/finetune_towers.py")
    with pytest.raises(ConfigError, match=told):
        build(of_release(finetune.get_config(), folder))
    config = of_release(finetune_towers.get_config(), folder)
    check_config(config)
    stage = parse_schedule(config.schedule, config.stages)[0].stage
    experiment = build(config)
    length = experiment.system.model.text.context_length
    assert rows(experiment, stage, 0)[0].tokens.shape == (1, length)


def test_classes_of_a_release_are_named(tmp_path):
    config = of_release(finetune_towers.get_config(), release_of("vit_jax_token", tmp_path))
    config.stages.pairs = ConfigDict(CLASSES.stages.pairs.to_dict())
    with pytest.raises(ConfigError, match=tried("{}; name the classes with the kind class_head")):
        build(config)
    config.decoder = ConfigDict({"kind": "class_head", "names": tuple("abcdefg")})
    assert build(config).labels == tuple("abcdefg")
