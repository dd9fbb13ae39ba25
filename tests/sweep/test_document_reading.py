"""The sweep of pages of text: its points and rows, and the figure of precision by characters per visual token."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

from configs.sweeps import document_reading
from vlm_jax.build import PARTS, Experiment, build
from vlm_jax.sweep import points as points_module
from vlm_jax.sweep.costs import Costs
from vlm_jax.sweep.points import list_points, shared_config

LABELS = {
    "mlp@64",
    *(f"matryoshka_pool@{tokens}" for tokens in (1, 4, 16, 64)),
    *(
        f"{name}@{tokens}"
        for name in ("pixel_shuffle", "resampler", "random", "downsample_image")
        for tokens in (4, 16)
    ),
}


def loaded_figure():
    path = pathlib.Path(__file__).parents[2] / "experiments" / "document_reading" / "figure.py"
    spec = importlib.util.spec_from_file_location("document_reading_figure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figure():
    return loaded_figure()


@pytest.mark.parametrize(
    ("arg", "labels"),
    [("", LABELS), ("small", {"mlp@64", "pixel_shuffle@16"}), ("smoke", {"pixel_shuffle@16", "random@16"})],
)
def test_every_point_is_built_and_meets_its_budget(arg, labels, monkeypatch):
    """Costs and shapes are not traced."""
    monkeypatch.setattr(points_module, "costs", lambda experiment, sample: Costs(experiment.budget.left, 0.0, {}, {}))
    monkeypatch.setattr(Experiment, "boxed_shapes", lambda experiment: dict.fromkeys(PARTS))
    points = list_points(document_reading.get_config(arg))
    assert {point.label for point in points} == labels
    for point in points:
        assert point.costs.num_visual_tokens == point.config.token_budget
        name = point.label.split("@")[0]
        trained = {"matryoshka_pool": "matryoshka_pool@64", "mlp": "untrained", "random": "untrained"}
        assert point.trained_as == trained.get(name, point.label)
        steps = {"untrained": (), "resampler@16": ("long_adaptation",)}.get(point.trained_as)
        assert steps is None or tuple(point.config.schedule) == steps


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValueError, match="this config takes small or smoke, not 'tiny'"):
        document_reading.get_config("tiny")


@pytest.mark.parametrize("arg", ["", "small", "smoke"])
def test_every_sample_fits_its_row_its_prompt_and_its_answer(arg):
    config = document_reading.get_config(arg)
    experiment = build(shared_config(config.base, 0, ("encoder_pretraining", "decoder_pretraining")))
    source, tokenizer = experiment.open_source(), experiment.system.processor.tokenizer
    questions, texts = source.train("questions", 0), source.train("text_pages", 0)
    for index in range(30):
        experiment.training_row(questions[index])
        experiment.training_row(texts[index], shape=experiment.text_rows["text_pages"])
    for sample in source.evaluation(0):
        assert len(tokenizer.encode(sample.answer)) < config.base.evaluation.max_new_tokens
        assert 1 + len(tokenizer.encode(sample.question)) <= config.base.evaluation.question_length


def result(connector, tokens, seed, precisions):
    accuracy = {
        task: {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 64} for task, mean in precisions.items()
    }
    return {
        "connector": connector,
        "token_budget": tokens,
        "num_visual_tokens": tokens,
        "realised_visual_tokens": {"mean": tokens, "max": tokens},
        "accuracy": accuracy,
        "num_params": {"encoder": 1},
        "flops": {"encoder": 1.0},
        "step_seconds": 1.0,
        "peak_bytes": None,
        "seed": seed,
        "command": "",
    }


RESULTS = [
    result("mlp", 256, 0, {"ocr:4x4": 0.9, "ocr:8x16": 0.8, "ocr_line:4x4": 0.7}),
    result("random", 16, 0, {"ocr:4x4": 0.5, "ocr:8x16": 0.25}),
    result("mlp", 16, 0, {"ocr:4x4": 0.6, "ocr:8x16": 0.4, "ocr_line:4x4": 0.3}),
]


def test_readings_are_by_characters_per_visual_token(figure):
    found = figure.readings(RESULTS, "ocr")
    assert [(r.connector, r.characters, r.per_token, r.precision.mean) for r in found] == [
        ("mlp", 16, 1 / 16, 0.9),
        ("random", 16, 1.0, 0.5),
        ("mlp", 16, 1.0, 0.6),
        ("mlp", 128, 0.5, 0.8),
        ("random", 128, 8.0, 0.25),
        ("mlp", 128, 8.0, 0.4),
    ]
    assert [r.precision.mean for r in figure.readings(RESULTS, "ocr_line")] == [0.7, 0.3]
    with pytest.raises(ValueError, match="no task 'read:ROWSxCOLS' in the results; they have ocr:4x4, ocr:8x16"):
        figure.readings(RESULTS, "read")


def test_the_table_has_every_reading_and_what_guessing_reaches(figure):
    rows = figure.table(figure.readings(RESULTS, "ocr")).splitlines()[2:]
    assert rows[:3] == [
        "| 16 | `random` | 16 | 1 | 50.0 [45.0, 55.0] |",
        "| 16 | `mlp` | 16 | 1 | 60.0 [55.0, 65.0] |",
        "| 16 | `mlp` | 256 | 0.0625 | 90.0 [85.0, 95.0] |",
    ]
    assert len(rows) == 6 + 2
    # Alone, a character is right with one chance in 36; insertions and deletions find more in long texts.
    guessed = [float(re.search(r"([\d.]+) \|$", row).group(1)) for row in rows[-2:]]
    assert [row.split(" | ")[1] for row in rows[-2:]] == ["guessing", "guessing"]
    assert 100 / 36 < guessed[0] < guessed[1] < 12


def test_seeds_are_averaged_with_their_interval(figure):
    several = [*RESULTS, result("mlp", 16, 1, {"ocr:4x4": 0.7, "ocr:8x16": 0.5, "ocr_line:4x4": 0.3})]
    reading = next(
        r for r in figure.readings(several, "ocr") if (r.connector, r.tokens, r.characters) == ("mlp", 16, 16)
    )
    assert reading.precision.mean == pytest.approx(0.65) and reading.precision.seeds == {0: 0.6, 1: 0.7}
    assert reading.precision.low < 0.6 and reading.precision.high > 0.7


@pytest.mark.parametrize(
    ("curves", "titles", "names"),
    [
        ("connector", ["16 characters (4x4)", "128 characters (8x16)"], ["mlp", "random (control)"]),
        ("size", ["mlp", "random"], ["16 characters (4x4)", "128 characters (8x16)"]),
    ],
)
def test_curves_are_drawn_over_a_logarithmic_axis(figure, curves, titles, names, tmp_path):
    drawn = figure.draw(figure.readings(RESULTS, "ocr"), "1 seed", curves)
    drawn.savefig(tmp_path / "figure.png")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [f"{title} (1 seed)" for title in titles]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == names
    first = drawn.axes[0]
    assert first.get_xscale() == "log"
    (line, *_), (across, up) = first.containers[0], ((1 / 16, 1.0), (0.9, 0.6))
    np.testing.assert_allclose(line.get_xdata().astype(float), across)
    np.testing.assert_allclose(line.get_ydata().astype(float), up)
    guesses = [line for line in first.lines if line.get_gid() == "guess"]
    lengths = (16,) if curves == "connector" else (16, 128)
    assert sorted(line.get_ydata()[0] for line in guesses) == [figure.guessed_precision(n) for n in lengths]


def test_guesses_are_as_long_as_what_is_asked_for(figure):
    lines, pages = figure.readings(RESULTS, "ocr_line"), figure.readings(RESULTS, "ocr")
    assert {reading.length for reading in lines} == {4} and {reading.length for reading in pages} == {16, 128}
