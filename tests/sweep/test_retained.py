"""What points retain of the full budget, and their ranks: numbers by hand, in the file and on the page."""

import json

import numpy as np
import pytest
from etils import epath

from vlm_jax.evals.bootstrap import repetitions
from vlm_jax.evals.ranks import ranks
from vlm_jax.sweep.frontier import combine_seeds
from vlm_jax.sweep.retained import RETAINED_FILE, Share, over_seeds, retained, told, write_retained

from .test_report import CONTROLS, one, result
from .test_report import report as report_of

# Of each question: its task, its turns, and whether each point is right.
QUESTIONS = [
    ("read", 1, {"mlp": 1, "pool": 1, "random": 0}),
    ("read", 2, {"mlp": 1, "pool": 0, "random": 0}),
    ("read", 2, {"mlp": 1, "pool": 1, "random": 0}),
    ("count", 1, {"mlp": 1, "pool": 1, "random": 1}),
    ("count", 1, {"mlp": 1, "pool": 1, "random": 0}),
    ("lost", 1, {"mlp": 0, "pool": 1, "random": 0}),
]


def answers(label):
    return [
        {"sample_id": f"{n}", "group": f"{n}", "task": task, "turns": turns, "question": "?", "references": ["a"]}
        | {"text": "a" if right[label.split("@")[0]] else "b", "is_finished": True}
        for n, (task, turns, right) in enumerate(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def found():
    runs = [result("mlp", 64, {"read": (1, 0, 1)}), result("pool", 4, {"read": (0.5, 0, 1)})]
    runs += [result("random", 4, {"read": (0, 0, 1)})]
    runs = [run | {"label": f"{run['connector']}@{run['token_budget']}"} for run in runs]
    return runs, retained(combine_seeds(runs), answers, {}, CONTROLS)


def test_shares_and_groups_by_hand(found):
    """The full budget is the candidate with the most tokens; what it never answers is left out."""
    kept = found[1]
    assert (kept.full, kept.benchmarks, kept.groups) == ("mlp@64", ["read", "count"], ["OCR", "multi-turn"])
    means = {
        point.label: (
            point.overall.share.mean,
            {name: cell.share.mean for name, cell in point.benchmarks.items()},
            {name: cell.share.mean for name, cell in point.groups.items()},
        )
        for point in kept.points
    }
    third = pytest.approx(200 / 3)
    assert means["mlp@64"] == (100, {"read": 100, "count": 100}, {"OCR": 100, "multi-turn": 100})
    assert means["pool@4"] == (pytest.approx(500 / 6), {"read": third, "count": 100}, {"OCR": third, "multi-turn": 50})
    assert means["random@4"] == (25, {"read": 0, "count": 50}, {"OCR": 0, "multi-turn": 0})


def test_without_a_full_budget_or_its_scores_there_is_nothing(found):
    runs = found[0]

    def wrong(label):
        return [line | {"text": "c"} for line in answers(label)]

    assert retained(combine_seeds(runs), wrong, {}, CONTROLS) is None
    assert retained(combine_seeds(runs[2:]), answers, {}, CONTROLS) is None


def test_intervals_are_those_of_the_resampled_pictures(found):
    """By NumPy: every replicate repeats each question for both points, and what has no question is left out."""
    counts = np.stack([repetitions(f"{n}") for n in range(3)])
    pool = np.array([1, 0, 1]) @ counts
    with np.errstate(invalid="ignore"):
        expected = np.nanquantile(100 * pool / counts.sum(axis=0), (0.025, 0.975))
    share = found[1].points[1].benchmarks["read"].share
    assert (share.low, share.high) == pytest.approx(tuple(expected))


def test_ranks_are_among_points_of_one_budget(found):
    mlp, pool, random = found[1].points
    assert mlp.overall.rank is None
    assert (pool.overall.rank.rank, random.overall.rank.rank) == (1, 2)
    assert pool.overall.rank.best > 0.9 and pool.overall.rank.best + random.overall.rank.best == pytest.approx(1)
    # On `count` they differ in question 4 alone, which a replicate lacks with chance exp(-1); it needs one that the
    # full budget answers, so that it lacks both with exp(-2).
    tied = (np.exp(-1) - np.exp(-2)) / (1 - np.exp(-2))
    assert random.benchmarks["count"].rank.best == pytest.approx(tied / 2, abs=0.03)
    assert random.benchmarks["count"].rank.low == 1.5


def test_seeds_are_resampled():
    """Of two seeds one is drawn in each replicate; the variance of means of any number is that of their mean, s^2/n."""

    def drawn(*shares):
        return over_seeds([{"read": np.full(1001, share)} for share in shares])["read"]

    scores = np.stack([drawn(0.8, 0.4), drawn(0.5, 0.6)], axis=1)
    assert scores[0] == pytest.approx((0.6, 0.55))
    assert np.unique(scores[1:, 0].round(9)).tolist() == [0.4, 0.8]
    assert ranks(scores)[0].best == pytest.approx(0.5, abs=0.03)
    for shares in ((0.8, 0.4), (0.8, 0.4, 0.3), (0.8, 0.4, 0.3, 0.1, 0.9)):
        assert drawn(*shares)[1:].var() == pytest.approx(np.var(shares, ddof=1) / len(shares), rel=0.1)
    assert drawn(0.7) == pytest.approx(0.7)


def test_an_interval_needs_a_hundred_replicates_with_a_number():
    values = np.concatenate([[50.0], np.arange(100.0), np.full(900, np.nan)])
    share = told(values)
    assert (share.mean, share.low, share.high) == (50, pytest.approx(2.475), pytest.approx(96.525))
    values[1] = np.nan
    assert told(values) == Share(50.0, None, None)


def runs_of(*points):
    """Results of (connector, budget, seeds)."""
    named = [
        (connector, budget, seed, f"{connector}@{budget}" + (f"#{seed}" if seed else ""))
        for connector, budget, seeds in points
        for seed in seeds
    ]
    return [
        result(name, budget, {"read": (1.0, 0.0, 1.0)}, seed=seed, label=label) for name, budget, seed, label in named
    ]


def test_ranks_are_of_the_seeds_that_all_points_have_and_the_page_says_so(tmp_path):
    """Both seeds of `mlp` and `pool`, the second of `random`; what has none of `mlp`'s, or none in common, is named."""
    runs = runs_of(
        ("mlp", 64, (0, 1)), ("pool", 4, (0, 1)), ("random", 4, (1,)), ("pool", 2, (0,)), ("random", 2, (1,))
    )
    runs += runs_of(("pool", 1, (2,)))
    kept = retained(combine_seeds(runs), answers, {}, CONTROLS)
    seeds = {point.label: (point.seeds, point.rank_seeds) for point in kept.points}
    assert seeds == {
        "mlp@64": ((0, 1), ()),
        "pool@4": ((0, 1), (1,)),
        "random@4": ((1,), (1,)),
        "pool@2": ((0,), ()),
        "random@2": ((1,), ()),
    }
    assert (kept.left_out, kept.unranked) == ({"pool@1": "no seed of mlp@64"}, (2,))
    section = one(report_of(tmp_path, runs, examples=[], retained=kept).all("section", id="retained"))
    heads = [one(row.all("th")).text for row in one(section.all("tbody")).all("tr")]
    assert heads == [
        "mlp@64",
        "pool@4 ranks of seeds 1",
        "random@4 control of seeds 1 ranks of seeds 1",
        "pool@2 of seeds 0",
        "random@2 control of seeds 1",
    ]
    said = [line.text for line in one(section.all("ul")).all("li")]
    assert said == ["pool@1 is left out: no seed of mlp@64.", "No ranks at 2: its points have no seed in common."]


def test_without_turns_in_every_row_no_point_has_the_group_of_several_turns(found, tmp_path):
    def older(label):
        rows = answers(label)
        if label == "random@4":
            del rows[-1]["turns"]
        return rows

    kept = retained(combine_seeds(found[0]), older, {}, CONTROLS)
    assert kept.groups == ["OCR"] and not kept.has_turns and found[1].has_turns
    assert [point.overall for point in kept.points] == [point.overall for point in found[1].points]
    notes = [
        one(report_of(tmp_path, found[0], examples=[], retained=shown).all("section", id="retained")).text
        for shown in (kept, found[1])
    ]
    assert ["no group multi-turn" in note for note in notes] == [True, False]


def test_the_file_and_the_page_have_them(found, tmp_path):
    runs, kept = found
    write_retained(kept, epath.Path(tmp_path) / RETAINED_FILE)
    written = json.loads((tmp_path / RETAINED_FILE).read_text())
    assert written["full"] == "mlp@64" and written["points"][2]["benchmarks"]["count"]["share"]["mean"] == 50
    for _ in range(2):
        write_retained(None, epath.Path(tmp_path) / RETAINED_FILE)
        assert not (tmp_path / RETAINED_FILE).exists()
    page = report_of(tmp_path, [*runs[:2], runs[2] | {"question": "last"}], examples=[], retained=kept)
    names = [one(row.all("th")).text for row in one(one(page.all("section", id="points")).all("tbody")).all("tr")]
    assert names == ["mlp@64", "pool@4", "random@4 control chosen by the last question"]
    rows = {one(row.all("th")).text: row for row in one(one(page.all("section", id="retained")).all("tbody")).all("tr")}
    cells = [cell.text for cell in rows["random@4 control"].all("td")]
    share, rank = kept.points[2].overall.share, kept.points[2].overall.rank
    assert cells[0] == f"25.0 [{share.low:.1f}, {share.high:.1f}]rank 2 [2, 2], best {100 * rank.best:.0f}%"
    assert len(cells) == 5 and [cell.text for cell in rows["mlp@64"].all("td")] == ["100.0 [100.0, 100.0]"] * 5
