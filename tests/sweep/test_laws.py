"""The law of error: known laws and published numbers are found again, and the script prints what it fitted."""

import importlib.util
import itertools
import json
import pathlib

import numpy as np
import pytest

from configs.sweeps import laws as sweeps
from vlm_jax.build import PARTS, Experiment
from vlm_jax.sweep import points as points_module
from vlm_jax.sweep.costs import Costs
from vlm_jax.sweep.laws import Law, Measured, best_within, exponent_intervals, fit, hold_out, splits
from vlm_jax.sweep.points import list_points

from ..advice import tried
from .test_report import result

SIZES, TOKENS = (1e4, 4e4, 1.6e5, 6.4e5), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
LAW = Law(2.0, 0.3, 0.15, 0.05)
# Accuracy of LLaVA-NeXT with Qwen1.5 of so many billion parameters, the mean of nine benchmarks of visual reasoning:
# scaling_law_code/values.py of Li et al. 2024.
RELEASED_TOKENS = (1, 4, 16, 36, 64, 144, 576)
RELEASED = {
    0.5: (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
    1.8: (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
    4.0: (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
    7.0: (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
}


def points_of(law, noise=0.0):
    rng = np.random.default_rng(0)
    return [
        Measured(size, float(tokens), float(law.error(size, tokens) + noise * rng.normal()))
        for size in SIZES
        for tokens in TOKENS
    ]


def test_a_known_law_is_found_again():
    found = fit(points_of(LAW))
    given = (LAW.coefficient, LAW.alpha, LAW.beta, LAW.floor)
    assert (found.coefficient, found.alpha, found.beta, found.floor) == pytest.approx(given, rel=1e-5)
    noisy = points_of(LAW, noise=0.005)
    found = fit(noisy)
    assert (found.alpha, found.beta) == pytest.approx((LAW.alpha, LAW.beta), abs=0.05)
    with pytest.raises(ValueError, match=tried("got {7} of {1} and {7}; add some, or hold fewer out")):
        fit(noisy[:7])
    assert fit(noisy[:14]).beta > 0


def test_the_published_numbers_have_the_published_exponents():
    """Figure 1 has alpha 0.077 and beta 0.015; in section 3 the law predicts the largest model within 2%."""
    points = [
        Measured(size, float(tokens), 1 - accuracy)
        for size, accuracies in RELEASED.items()
        for tokens, accuracy in zip(RELEASED_TOKENS, accuracies, strict=True)
    ]
    law = fit(points)
    assert (law.alpha, law.beta) == pytest.approx((0.077, 0.015), abs=0.007)
    assert (law.alpha, law.beta) == pytest.approx((0.071, 0.015), abs=5e-4)  # as on the page
    held = hold_out(points, splits(points)["largest model"])
    assert held.rms < 0.01 < 0.05 < held.rms_of_mean


def test_ranges_of_exponents_are_of_whole_trainings_of_a_size():
    """Two seeds, each with a law of its own: every size has all of its points from one of them, in 16 ways."""
    laws = LAW, Law(2.2, 0.32, 0.13, 0.04)

    def point(size, tokens, *seeds):
        errors = {seed: float(laws[seed].error(size, tokens)) for seed in seeds}
        return Measured(size, tokens, sum(errors.values()) / len(errors), errors)

    ends = exponent_intervals([point(size, tokens, 0, 1) for size in SIZES for tokens in TOKENS])
    fits = [
        fit(
            [point(size, tokens, seed) for size, seed in zip(SIZES, way, strict=True) for tokens in TOKENS],
            ((0.3, 0.1),),
        )
        for way in itertools.product((0, 1), repeat=len(SIZES))
    ]
    for name in ("alpha", "beta"):
        exponents = [getattr(law, name) for law in fits]
        assert ends[name] == pytest.approx((min(exponents), max(exponents)), abs=1e-4)
    once = [point(size, tokens, *((0,) if size == SIZES[0] else (0, 1))) for size in SIZES for tokens in TOKENS]
    assert exponent_intervals(once) is None


def test_held_out_points_are_predicted_by_the_law_of_the_others():
    points, places = points_of(LAW, noise=0.005), np.arange(len(SIZES) * len(TOKENS)).reshape(len(SIZES), -1)
    held = splits(points)
    assert np.flatnonzero(held["largest model"]).tolist() == places[-1].tolist()
    assert np.flatnonzero(held["every fourth"]).tolist() == [2, 6, 8, 12, 14, 18, 24]
    for out in held.values():
        found = hold_out(points, out)
        law = fit([point for point, one in zip(points, out, strict=True) if not one])
        errors = np.array([point.error for point in points])
        predicted = np.array([float(law.error(point.size, point.tokens)) for point in points])
        assert found.law == law and found.predicted == pytest.approx(predicted[out])
        assert found.rms == pytest.approx(np.sqrt(((predicted - errors)[out] ** 2).mean()))
        assert found.rms_of_mean == pytest.approx(np.sqrt(((errors[~out].mean() - errors[out]) ** 2).mean()))
        assert found.rms < 0.01


@pytest.mark.parametrize(("alpha", "text"), [(0.3, 20.0), (0.3, 0.0), (0.2, 5.0), (0.1, 8.0)])
def test_the_best_tokens_are_those_of_a_search(alpha, text):
    """The size is what FLOPs leave; their number does not matter."""
    law, tokens = Law(2.0, alpha, 0.15, 0.05), np.linspace(1, 64, 6301)
    for flops in (1e6, 1e9):
        errors = law.error(flops / (2 * (text + tokens)), tokens)
        assert law.optimal_tokens(text, 1.0, 64.0) == pytest.approx(tokens[np.argmin(errors)], abs=0.02)


def test_the_best_of_what_there_is_fits_the_flops():
    """By the law, also where another point has less error by chance; only of those that are measured."""
    points = [point for point in points_of(LAW) if point.tokens != 8] + [Measured(1e4, 8.0, 0.0)]
    assert best_within(LAW, 2 * 1e4 * 21, 5.0, points) == Measured(1e4, 16.0, float(LAW.error(1e4, 16.0)))
    without = [point for point in points if (point.size, point.tokens) != (1e4, 16.0)]
    assert best_within(LAW, 2 * 1e4 * 21, 5.0, without) == Measured(1e4, 8.0, 0.0)
    assert best_within(LAW, 1e4, 5.0, points) is None


def write_results(folder, size, pairs):
    """Results of (tokens, seed); seeds are 0.01 above and below the law."""
    rows = []
    for tokens, seed in pairs:
        accuracy = {"read": (1 - float(LAW.error(size, tokens)) + (-0.01, 0.01)[seed], 0.0, 1.0)}
        parts = {"encoder": 5, "decoder": int(size)}
        rows.append(result("mlp", tokens, {"read": (0.0, 0.0, 1.0)}, seed=seed))  # not of the law
        rows.append(result("matryoshka", int(tokens), accuracy, num_params=parts, seed=seed))
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def script():
    folder = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "laws"
    spec = importlib.util.spec_from_file_location("experiments_laws", folder / "laws.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_script_prints_and_draws_the_law_of_every_task(script, tmp_path, capsys):
    """Also where sweeps are not finished, and names what is missing."""
    every = list(itertools.product(TOKENS, (0, 1)))
    for number, size in enumerate(SIZES):
        write_results(tmp_path / f"digits_{number}", size, every)
    write_results(tmp_path / "documents_0", SIZES[0], every)
    write_results(tmp_path / "documents_1", SIZES[1], every[:-3])
    write_results(tmp_path / "plain_0", SIZES[0], every)
    script.main([str(tmp_path), "--text_tokens=20", "--flops", "1.68e6"])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "laws.json").read_text())
    tasks = [(law["pages"], law["task"]) for law in written["laws"]]
    assert tasks == [(pages, task) for pages in ("digits", "documents") for task in ("read", script.ALL)]
    assert written["laws"][0]["points"][0]["seeds"] == {
        "0": pytest.approx(LAW.error(1e4, 1.0) + 0.01),
        "1": pytest.approx(LAW.error(1e4, 1.0) - 0.01),
    }
    (alpha_low, alpha_high), (low, high) = written["laws"][0]["intervals"].values()
    assert alpha_low < 0.29 < 0.31 < alpha_high and low < 0.149 < 0.151 < high
    exponents = f"0.300 [{alpha_low:.3f}, {alpha_high:.3f}] | 0.150 [{low:.3f}, {high:.3f}]"
    assert f"| digits | read | {exponents} | 5.0 | 0.0 | 0.0 (" in printed
    # 0.15 * 20 / (0.3 - 0.15) tokens; among those measured, 64 with the smallest decoder, or 1 with the next.
    options = {(1e4, 64.0): LAW.error(1e4, 64.0), (4e4, 1.0): LAW.error(4e4, 1.0)}
    (size, tokens), error = min(options.items(), key=lambda option: option[1])
    found = f"{tokens:g}, {size:,.0f} | {100 * error:.1f} | {100 * error:.1f} |"
    assert f"| digits | read | 1.7e+06 | 20.0 | 21,000 | {found}" in printed
    assert (tmp_path / "laws.png").read_bytes().startswith(b"\x89PNG")
    lacking = "32 tokens (seed 1), 64 tokens (seed 0), 64 tokens (seed 1)"
    assert f"\ndocuments_1: not finished: lacks {lacking}; the law is fitted to its other points\n" in printed
    few = "left out: expected at least five points, of two sizes and two numbers of tokens, got 7 of 1 and 7;"
    assert f"\nplain, read: {few}" in printed and f"\ndocuments, read, largest model held out: {few}" in printed
    assert printed.count("left out: ") == 4  # for two tasks each


def test_without_sizes_or_folders_the_script_raises(script, tmp_path):
    with pytest.raises(ValueError, match=r"folders such as digits_16 with results\.jsonl; run the sweeps first"):
        script.measured(script.epath.Path(tmp_path))
    write_results(tmp_path / "digits_0", SIZES[0], [(1.0, 0), (2.0, 0)])
    with pytest.raises(ValueError, match=r"no law can be fitted\ndigits, read: left out: .* got 2 of 1 and 2"):
        script.main([str(tmp_path)])


@pytest.mark.parametrize(("arg", "width", "rate"), [("digits_16", 16, 2e-3), ("documents_128", 128, 1e-3)])
def test_every_size_is_trained_once_for_all_budgets(arg, width, rate, monkeypatch):
    """Costs and shapes are not traced."""
    monkeypatch.setattr(points_module, "costs", lambda experiment, sample: Costs(experiment.budget.left, 0.0, {}, {}))
    monkeypatch.setattr(Experiment, "boxed_shapes", lambda experiment: dict.fromkeys(PARTS))
    found = [point for point in list_points(sweeps.get_config(arg)) if point.connector != "mlp"]
    labels = [f"matryoshka@{tokens:g}{seed}" for tokens in TOKENS for seed in ("", "#1")]
    assert sorted(point.label for point in found) == sorted(labels)
    assert {point.costs.num_visual_tokens for point in found} == set(TOKENS)
    assert {point.trained_as for point in found} == {"matryoshka@64", "matryoshka@64#1"}
    for point in found:
        decoder = point.experiment.system.model.decoder
        assert (decoder.width, decoder.num_heads * 8) == (width, width)
        assert point.config.stages.long_adaptation.learning_rates.decoder == rate
    with pytest.raises(ValueError, match=r"this config takes digits_16, .* or smoke, not 'digits'"):
        sweeps.get_config("digits")
