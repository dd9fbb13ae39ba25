"""Runs of `config.release`: a released system trains through its own processor and answers from the workdir."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

import vlm_jax
from configs import finetune
from tests.contracts import releases
from vlm_jax.build import build, of_system
from vlm_jax.checkpoints.hub import CheckpointFileError, read_config
from vlm_jax.config import ConfigError
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.pretrained.configured import configured
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.loader import open_system
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.sweep.release_points import list_release_points
from vlm_jax.train.claim import Claim
from vlm_jax.train.loop import Trainer
from vlm_jax.types import Sample

from ..advice import tried

LENGTH, TILES = 128, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    releases.make("llava", folder)
    for number in range(3):
        Image.new("RGB", (24, 16), ("red", "green", "blue")[number]).save(folder / f"{number}.png")
    records = [
        {"id": "none", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]},
        {
            "id": "three",
            "image": ["0.png", "1.png", "2.png"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nwhich?"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "<image>\nthis?"},
                {"from": "gpt", "value": "c"},
            ],
        },
        {"id": "one", "image": "2.png", "question": "what?", "answer": "d"},
    ]
    for name in ("train", "evaluation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def config_of(folder, **changes):
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(folder), "float32"
        config.row.update({"length": LENGTH, "images": TILES})
        config.data.update(
            {"train_path": str(folder / "train.jsonl"), "evaluation_path": str(folder / "evaluation.jsonl")}
        )
        config.stages.instruction.update({"steps": 2, "batch_size": 3, "warmup_steps": 1})
        config.loop.update({"log_every": 1})
        for key, value in changes.items():
            config[key] = ConfigDict(value) if isinstance(value, dict) else value
    return config


@pytest.fixture(scope="module")
def run(folder, one_device, tmp_path_factory):
    """A run with another connector, its experiment and its workdir."""
    config = config_of(folder, connector={"kind": "pool"}, token_budget=4)
    experiment, workdir = build(config), tmp_path_factory.mktemp("run") / "run"
    outcome = Trainer(config, experiment, one_device, workdir).run()
    return experiment, workdir, outcome


@pytest.mark.parametrize("kind", ["none", "fastv", "visionzip"])
def test_rows_of_any_number_of_pictures_have_one_structure(folder, kind):
    reducer = {"kind": kind, "positions": "keep"} if kind == "visionzip" else {"kind": kind}
    experiment = build(config_of(folder, reducer=reducer, token_budget=None if kind == "none" else 4))
    records, _ = experiment.open_source().trained["train_path"]
    rows = [experiment.training_row(records[number]) for number in range(3)]
    assert len({str(jax.tree.structure(row)) for row in rows}) == 1
    shapes = {tuple(np.shape(leaf) for leaf in jax.tree.leaves(row)) for row in rows}
    assert len(shapes) == 1 and rows[0].images.shape[1] == TILES
    with pytest.raises(SequenceTooLong, match=r"three' .* over the limit of 2"):
        narrow = config_of(folder, row={"length": LENGTH, "images": 2, "text_length": None})
        build(narrow).training_row(records[1])


def test_what_the_release_has_is_read_and_the_rest_is_drawn(folder, run, one_device):
    experiment, *_ = run
    released, params = vlm_jax.from_pretrained(folder).params, experiment.initial(jax.random.key(0), one_device)
    assert experiment.system.release.drawn == ("connector",)
    for part in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, params[part], released[part])
    kernels = [jax.tree.leaves(tree["connector"]) for tree in (params, released)]
    assert not any(np.array_equal(ours, theirs) for ours, theirs in zip(*kernels, strict=True) if ours.ndim > 1)


def test_a_workdir_answers_with_the_trained_parameters(run, folder):
    _, workdir, outcome = run
    again = vlm_jax.from_pretrained(workdir)
    jax.tree.map(np.testing.assert_array_equal, again.params, dict(outcome.params))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    answer = again.generate(messages, [folder / "2.png"], max_new_tokens=2)
    assert answer.visual_tokens == (4,)
    with pytest.raises(CheckpointFileError, match="the released schema has no names for the connector"):
        again.save_pretrained(workdir / "out")


def test_a_workdir_starts_another_run_and_an_evaluation(run, one_device):
    """Its connector too, for which the release has no parameters; one that replaces it again is random."""
    _, workdir, outcome = run
    with pytest.raises(PretrainedError, match=tried("config: {} is a run, which has its own; pass a release")):
        vlm_jax.from_pretrained(workdir, config={})
    again = build(config_of(workdir))
    assert again.system.release.drawn == ("connector",) and not again.system.release.initialised
    trained = again.initial(jax.random.key(1), one_device)
    jax.tree.map(np.testing.assert_array_equal, trained, dict(outcome.params))
    points, refused = list_release_points(open_system(workdir, FAMILIES, dtype="float32"), ("none", "random"), (2,))
    assert [one.label for one in points] == ["none@released", "random@2"], (points, refused)
    replaced = build(config_of(workdir, connector={"kind": "resampler"}, token_budget=2)).system.release
    assert replaced.initialised == ("connector",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"widht": 3}}, r"config\.encoder\.widht: unknown or unused key; did you mean 'width'"),
        (
            {"row": {"length": None, "images": 1, "text_length": 9}},
            r"config\.row: .* with pack, need length",
        ),
        (
            {"token_budget_per": "tile"},
            tried("config.token_budget_per: the budget of a release is per image, or per tile; set it to image"),
        ),
        (
            {"evaluation": {"batch_size": 1, "question_length": 9, "max_new_tokens": 2}},
            tried("config.evaluation.question_length: prompts of a release have any length; set it to None"),
        ),
        ({"processor": {"max_pixel": 9}}, r"config\.processor\.max_pixel: unknown or unused key"),
    ],
)
def test_wrong_sections_are_named(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(config_of(folder, **changes))


def test_the_model_thinks_or_not_in_training_and_evaluation(tmp_path, folder):
    """Answers follow the head of the prompt that the same setting makes."""
    (tmp_path / "qwen").mkdir()
    releases.make("qwen2_5_vl", tmp_path / "qwen")
    (tmp_path / "qwen" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ '+' if enable_thinking else '-' }}"
        "{{ m.content }}<|im_end|>{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ '+' if enable_thinking else '-' }}{% endif %}"
    )
    system = open_system(tmp_path / "qwen", FAMILIES, dtype="float32")
    sample = Sample("a", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"}))
    for enable, head in ((None, "-"), (False, "-"), (True, "+")):
        changes = {"processor": {"enable_thinking": enable}, "row": {"length": LENGTH, "images": 64}}
        experiment = of_system(config_of(tmp_path / "qwen", **changes), system)
        tokenizer = system.processor.tokenizer
        asked, told = (experiment.example(sample, targets=targets) for targets in (False, True))
        ids = [index for piece in asked.pieces for index in piece.ids]
        assert tokenizer.decode(ids).endswith(head)
        learned = [index for piece in told.pieces if piece.learned for index in piece.ids]
        assert tokenizer.decode(learned).startswith("b")
    with pytest.raises(ChatTemplateError, match="unused variable 'enable_thinking'"):
        build(config_of(folder, processor={"enable_thinking": True}))


def test_sections_that_are_set_as_the_messages_say_are_read(folder):
    evaluation = {"batch_size": 1, "question_length": None, "max_new_tokens": 2}
    assert build(config_of(folder, token_budget_per="image", evaluation=evaluation)).prompt is None


def test_a_workdir_has_the_settings_of_its_run(folder, tmp_path):
    config = config_of(folder, processor={"max_pixels": 20, "max_length": None}, decoder={"norm_epsilon": 0.5})
    claim = Claim(epath.Path(tmp_path / "run"), config)
    with claim.held():
        claim.record()
    again = configured(open_system(folder, FAMILIES, dtype="float32"), read_config(tmp_path / "run"))
    assert again.processor.max_pixels == 20 and again.model.decoder.norm_epsilon == 0.5
    assert again.model == build(config).system.model


def test_another_connector_leaves_the_tiles_of_a_picture(tmp_path):
    releases.make("llava_next", tmp_path)
    system = open_system(tmp_path, FAMILIES, dtype="float32")
    kept = with_budget(system, 4, connector="pool", reducer={"kind": "none"}).processor.views
    assert kept.loads([(32, 32)]) == system.processor.views.loads([(32, 32)]) != [1]
