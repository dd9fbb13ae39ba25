"""What messages on two towers and classifiers advise works: a fault of the config, the message, the run that begins."""

import pytest
from ml_collections import ConfigDict

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.train import writers
from vlm_jax.train.check import check_config
from vlm_jax.train.loop import Trainer

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
