"""What messages on the budget of a release advise works: a fault, the message, and the system that the fix gives."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

import vlm_jax
from tests.contracts.releases import make
from tests.golden.conftest import DATA
from tests.processes import alphabet
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.checkpoints.hub import CheckpointFileError
from vlm_jax.config import ConfigError
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.pretrained.configured import configured
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.loader import open_system
from vlm_jax.types import ImageTextBatch

from ..advice import tried

TOME, RANDOM, RANKED = {"reducer": "tome"}, {"reducer": "random"}, {"reducer": "visionzip"}
SMALLER = {"reducer": "downsample_image"}
QUERIES = {"connector": {"kind": "resampler", "num_heads": 4}}
AS_SAID = tried("{} are queries without a position; choose random, uniform_stride or divprune")
EXACT = tried("; set a reducer or another connector, which meet a budget exactly")

# (system of `FOLDERS`, fault, message, fix); each for 4 tokens
FIXES = [
    ("qwen2_vl", QUERIES, tried("packs several of any size into a sequence; choose one of {}"), {"connector": "mlp"}),
    ("qwen2_vl", TOME, tried("breaks the windows and blocks of {}; choose a reducer that acts on its"), RANDOM),
    ("qwen", TOME, tried("inside the encoder, but {} needs their grid; choose a reducer that acts after the"), RANDOM),
    ("qwen", RANKED, AS_SAID, RANDOM),
    ("qwen", RANKED, AS_SAID, {"reducer": "uniform_stride"}),
    ("qwen", RANKED, AS_SAID, {"reducer": "divprune"}),
    ("qwen", SMALLER, tried("the queries of {} make {9} tokens all the same; choose another reducer"), RANDOM),
    ("deepseek_vl_hybrid", TOME, tried("but {Hybrid} has no blocks of its own; choose another reducer"), RANDOM),
    (
        "deepseek_vl_hybrid",
        RANKED,
        tried(
            "{release.reducer}.kind: {} works inside the {}, but {} does not support it (no field {saliency}); choose"
        ),
        RANDOM,
    ),
    (
        "deepseek_vl_hybrid",
        SMALLER,
        tried("{} grid of features, and {Hybrid} gives {4x4} of {32}x{32} pixels; choose another reducer"),
        RANDOM,
    ),
    ("llava", {}, EXACT, RANDOM),
    ("llava", {}, EXACT, {"connector": "pool"}),
]


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """The system of a small folder, read once."""
    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp(name)).system)


@pytest.mark.parametrize(("name", "fault", "message", "fix"), FIXES)
def test_advice_on_a_budget_that_is_followed_helps(system, name, fault, message, fix):
    with pytest.raises((ConfigError, InfeasibleBudget), match=message):
        with_budget(system(name), 4, path="release", **fault)
    found = with_budget(system(name), 4, path="release", **fix)
    if name == "qwen2_vl":  # a bound of the tokens of an image
        found.processor.views.within(4)
    else:
        assert found.processor.views.tile_tokens == 4


def test_a_second_reducer_starts_from_the_release(system):
    once = with_budget(system("llava"), 4, reducer="random", path="release")
    with pytest.raises(
        ConfigError, match=tried("this system has a reducer already; start from the release without it")
    ):
        with_budget(once, 2, reducer="random", path="release")
    assert with_budget(system("llava"), 2, reducer="random", path="release").processor.views.tile_tokens == 2


def test_a_replaced_connector_is_not_saved_as_the_release(tmp_path):
    (tmp_path / "llava").mkdir()
    model = make("llava", tmp_path / "llava")
    told = tried(
        "no names for the {connector} that replaced the release's own; save the parameters as a run does, or load"
    )
    with pytest.raises(CheckpointFileError, match=told):
        model.with_budget(4, connector="pool").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert vlm_jax.from_pretrained(tmp_path / "llava").save_pretrained(tmp_path / "saved")


def test_tiles_with_class_tokens_are_set_to_the_default(tmp_path):
    make("llava_next", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changed = {**config, "vision_feature_select_strategy": "full"}
    told = tried("tiles with class tokens are not supported; set vision_feature_select_strategy to 'default'")
    with pytest.raises(PretrainedError, match=told):
        _ = vlm_jax.from_pretrained(tmp_path, config=changed).processor
    changed["vision_feature_select_strategy"] = "default"
    assert vlm_jax.from_pretrained(tmp_path, config=changed).processor.views.tile_tokens == 16


def test_a_model_of_texts_has_no_budget(tmp_path):
    alphabet.write(tmp_path)
    told = tried("token_budget: this model has no encoder with a decoder; leave it out")
    with pytest.raises(ConfigError, match=told):
        vlm_jax.from_pretrained(tmp_path, token_budget=4)
    answer = vlm_jax.from_pretrained(tmp_path).generate([{"role": "user", "content": "ab"}], max_new_tokens=2)
    assert answer.text == "cd"


def test_a_pooling_connector_takes_a_reducer_before_the_encoder(system):
    pooled = with_budget(system("llava"), 16, connector="pool", path="release")
    told = tried("{random} returns {4} features, for which the connector gives {16} tokens; choose another")
    with pytest.raises(ConfigError, match=told):
        with_budget(pooled, 4, reducer="random", path="release")
    assert with_budget(pooled, 4, **SMALLER, path="release").processor.views.tile_tokens == 4


def test_a_tower_without_a_head_gives_features():
    tower = vlm_jax.from_pretrained(DATA / "s2_siglip")
    batch = ImageTextBatch(jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(PretrainedError, match=tried("'{}' has no head in this checkpoint; call apply for features")):
        tower.logits(batch)
    assert jax.jit(tower.apply)(*batch.inputs).tokens.shape == (1, 64, 32)


NO_SECTIONS = {"token_budget": None, "reducer": {}, "connector": {}, "encoder": {}, "decoder": {}, "processor": {}}


@pytest.mark.parametrize(
    ("fault", "message", "fix"),
    [
        (
            {"token_budget": 4},
            tried("config.token_budget: a {TwoTower} has no visual tokens to count; set it to None"),
            {"token_budget": None},
        ),
        (
            {"reducer": {"kind": "random"}},
            tried("config.{reducer}.kind: a {TwoTower} has no {reducer}; set it to None"),
            {"reducer": {"kind": None}},
        ),
        ({"connector": {"kind": "mlp"}}, r"config\.connector\.kind: .*; set it to None", {"connector": {"kind": None}}),
    ],
)
def test_two_towers_have_no_budget(fault, message, fix):
    own = open_system(DATA / "open_clip_vit", FAMILIES, dtype="float32")
    with pytest.raises(ConfigError, match=message):
        configured(own, {**NO_SECTIONS, **fault})
    assert configured(own, {**NO_SECTIONS, **fix, "encoder": {"remat": "full"}}).model.image.remat == "full"
