"""What messages advise works: a fault of a config, the message that names the fix, and the run that begins after it."""

import functools

import jax
import pytest
from ml_collections import ConfigDict

from configs import base
from vlm_jax.build import build
from vlm_jax.build.sections import check_sections
from vlm_jax.cli.process import EXPLAINED
from vlm_jax.config import ConfigError, parse
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.check import check_config
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule

from ..advice import tried
from ..cases.training.files import config_of, records, write, write_files

SIZES = {"patch_size": 6, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "remat": "none"}
PACKED = {"encoder": {"kind": "naflex", "table_grid": (4, 4), **SIZES}, "processor__image_size": None}
MLP = {"connector": {"kind": "mlp"}}
RATES = "stages__tuning__learning_rates"
LEARNED = {"encoder": 1e-3, "connector": 1e-3, "decoder": 1e-3}
PAIRED = {"objective": "prefer", "stream": "preferences", "beta": 0.1}
PREFER = {f"stages__tuning__{key}": value for key, value in PAIRED.items()}
LORA = {"lora__rank": 2, "lora__target": ("decoder/*/attention",)}
CUT = {"row__length": 64, "row__images": 2, "row__text_length": None}
SAME = "{folder}/train.jsonl"

# (fault, message, the fix as further changes; None where it takes the fault's first key back)
FIXES = [
    (
        {"token_budget": 3},
        tried("{pool} cannot give {3} tokens from a {}x{} grid, because {}; nearest feasible: {2 and 4}"),
        {"token_budget": 2},
    ),
    (
        {"token_budget": 17},
        tried("{pool} cannot give {17} tokens from a {4}x{4} grid, because {}; nearest feasible: {16}"),
        {"token_budget": 16},
    ),
    (
        MLP,
        tried("{mlp} cannot give {4} tokens from a {4}x{4} grid, because {}; nearest feasible: {16}"),
        {"token_budget": 16},
    ),
    (
        {"decoder__vocab_size": 5},
        tried("{5} is less than the {60} tokens of config.processor.tokenizer; use the release's, or raise it"),
        {"decoder__vocab_size": 60},
    ),
    (
        PACKED,
        tried("{pool} needs one image's grid, but {} packs several images into a sequence; choose one of {}"),
        MLP,
    ),
    (
        {"connector": {"kind": "pool", "output_grid": (1, 1)}},
        tried("this value is derived from the rest of the config; remove the key"),
        {"connector": {"kind": "pool"}},
    ),
    (
        {"encoder": PACKED["encoder"], **MLP},
        tried("config.processor.{image_size}: set it to {None}; {} takes images of any size"),
        {"processor__image_size": None},
    ),
    (
        {"reducer": {"kind": "random"}, **PACKED, **MLP},
        tried("reduces image by image, but {} packs several into a sequence; set it to none"),
        {"reducer": {"kind": "none"}},
    ),
    ({"encoder__num_heads": 3}, tried("set num_heads to a divisor of it"), {"encoder__num_heads": 4}),
    (
        {"encoder__levels": (5,)},
        tried("with the hidden states 0 to {1}; choose from these, or raise {depth}"),
        {"encoder__depth": 5},
    ),
    (
        {"encoder__levels": (5,)},
        tried("with the hidden states 0 to {1}; choose from these, or raise {depth}"),
        {"encoder__levels": (1,)},
    ),
    (
        {"reducer": {"kind": "fastv", "layer": 1}, **MLP},
        tried("raise config.decoder.depth, or choose another reducer"),
        {"decoder__depth": 2},
    ),
    (
        {"reducer": {"kind": "fastv", "layer": 2}, "decoder__depth": 2, **MLP},
        tried("choose distinct layers from 1 to {1}"),
        {"reducer": {"kind": "fastv", "layer": 1}},
    ),
    (
        {"processor__thumbnail": True},
        tried("config.processor.thumbnail: needs several tiles; set it to False"),
        {"processor__thumbnail": False},
    ),
    (
        {"processor__min_tokens": 4},
        tried("encoders that pack images of any size; remove the key, or choose one of {}"),
        None,
    ),
    (
        {"processor__min_tokens": 4},
        tried("encoders that pack images of any size; remove the key, or choose one of {}"),
        {**PACKED, **MLP},
    ),
    (
        {"token_budget_per": "frame"},
        tried("set config.processor.frames, or choose image"),
        {"token_budget_per": "image"},
    ),
    ({"token_budget_per": "frame"}, tried("set config.processor.frames, or choose image"), {"processor__frames": 1}),
    (
        {"data__num_images": None},
        tried("set config.processor.frames to the number of sampled frames, or num_images to the images"),
        {"processor__frames": 1},
    ),
    (
        {"row__pictures": 3},
        tried("config.row.{pictures}: is only for a release, or with config.row.pack; set it to None"),
        {"row__pictures": None},
    ),
    (
        {"row__pack": True},
        tried("need length (positions) and images (tiles, or places of patches); set both, and text_length to None"),
        CUT,
    ),
    (
        {"row__pack": True, **CUT, "row__length": 8},
        r"needs 12 positions, config\.row\.length is 8",
        {"row__length": 12},
    ),
    (
        {"row__text_length": 2},
        tried("limit of {6}; raise {config.row.text_length} by {6} or more, or remove the sample"),
        {"row__text_length": 8},
    ),
    (
        {"row__text_length": None, "row__length": 6},
        tried("raise {config.row.length} by {6} or more, or remove the sample"),
        {"row__length": 12},
    ),
    (
        {"data__evaluation_path": SAME},
        tried("config.data.evaluation_path: is {train_path}, {}; use a separate file"),
        None,
    ),
    ({"lora__rank": 2}, tried("got rank={2} and target={}; set both, or neither"), {"lora__rank": 0}),
    (LORA, tried("add 'lora' to the learning_rates of a stage, or set config.lora.rank to 0"), {RATES: {"lora": 1e-3}}),
    (
        LORA,
        tried("add 'lora' to the learning_rates of a stage, or set config.lora.rank to 0"),
        {"lora__rank": 0, "lora__target": ()},
    ),
    (
        {RATES: {"encodr": 1e-3}},
        tried("; did you mean {'encoder' or 'decoder' or 'encoder/blocks'}?"),
        {RATES: LEARNED},
    ),
    ({"stages__tuning__beta": 0.1}, tried("is a key of the objective {prefer}; remove it"), None),
    ({"stages__tuning__batch_size": 6, "stages__tuning__accumulate": 4}, "expected a divisor of the batch_size", None),
    ({"stages__tuning__warmup_steps": 9}, "expected fewer than 4 steps", {"stages__tuning__warmup_steps": 3}),
    (
        {"stages__tuning__stream": "question"},
        tried("; did you mean '{questions}'?"),
        {"stages__tuning__stream": "questions"},
    ),
    ({"schedule": ("tunin",)}, tried("; did you mean '{tuning}'?"), {"schedule": ("tuning",)}),
    ({"loop__writers": ("tensorbord",)}, tried("; did you mean '{tensorboard}'?"), {"loop__writers": ("tensorboard",)}),
    ({"optimizer__clip_norm": 0.0}, r"\(inf for no clipping\)", {"optimizer__clip_norm": float("inf")}),
    (
        {"evaluation__max_new_tokens": 1},
        tried("has {2} tokens with the end token, over the limit of {1}; raise {config.evaluation.max_new_tokens}"),
        {"evaluation__max_new_tokens": 2},
    ),
    (
        {"data__train_path": "{folder}/two.jsonl"},
        r"2 images, but config\.data\.num_images is 1",
        {"data__num_images": 2, "data__evaluation_path": "{folder}/two_more.jsonl"},
    ),
    (
        {"data__train_path": "{folder}/ocr.jsonl"},
        r"task 'ocr' is not one of config\.data\.tasks: vqa",
        {"data__tasks": ("vqa", "ocr")},
    ),
    (
        {"data__train_path": "{folder}/pairs.jsonl", **PREFER, "row__pack": True, **CUT},
        tried("set config.row.pack to False and config.row.buckets to 1"),
        {"row__pack": False, "row__length": None, "row__images": None, "row__text_length": 60},
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files to train on, and such as need a key."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    two = [{**row, "image": ["0.png", "1.png"]} for row in records(8)]
    write(folder / "two.jsonl", two)
    write(folder / "two_more.jsonl", two[:4])
    write(folder / "ocr.jsonl", [{**row, "task": "ocr"} for row in records(8)])
    pair = {"prompt": "what?", "chosen": "a", "rejected": "b"}
    write(folder / "pairs.jsonl", [{**pair, "images": [f"{i}.png"]} for i in range(8)])
    return folder


def begin(folder, workdir, changes):
    """What a command does before its first step."""
    given = {key: section(value, folder) for key, value in changes.items()}
    config, mesh = config_of(folder, **given), one_device()
    check_config(config)
    experiment = build(config)
    Trainer(config, experiment, mesh, workdir, evaluator=evaluator_of(experiment, config))
    assert rows(experiment, parse_schedule(config.schedule, config.stages)[0].stage, config.seed, folder=workdir)[0]


@functools.cache
def one_device():
    return make_mesh(MeshSettings(data=1), jax.devices()[:1])


def section(value, folder):
    if isinstance(value, dict):
        return ConfigDict(value)
    return value.format(folder=folder) if isinstance(value, str) else value


@pytest.mark.parametrize(("fault", "message", "fix"), FIXES, ids=[message for _, message, _ in FIXES])
def test_advice_that_is_followed_helps(made, tmp_path, fault, message, fix):
    with pytest.raises(EXPLAINED, match=message):
        begin(made, tmp_path / "first", fault)
    if fix is None:
        fault, fix = dict(list(fault.items())[1:]), {}
    begin(made, tmp_path / "second", {**fault, **fix})


def test_a_missing_section_is_that_of_the_base(made):
    config = config_of(made).copy_and_resolve_references().unlock()
    del config["mesh"]
    with pytest.raises(ConfigError, match=tried("config.{mesh}: missing; see configs/base.py")):
        check_sections(config)
    config.mesh = base.get_config().mesh
    check_sections(config)
    assert parse(MeshSettings, config.mesh, "config.mesh") == MeshSettings()
