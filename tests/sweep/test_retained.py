"""What points retain of the full budget, and their ranks: numbers by hand, in the file and on the page."""

import json

import numpy as np
import pytest
from etils import epath

from vlm_jax.evals.bootstrap import repetitions
from vlm_jax.evals.ranks import ranks
from vlm_jax.sweep.frontier import combine_seeds
from vlm_jax.sweep.retained import RETAINED_FILE, over_seeds, retained

from .test_report import CONTROLS, Page, one, result
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
    """Of two seeds both are drawn in a half of the replicates, and one of them twice in a quarter each."""
    ours, theirs = ([{"read": np.full(1001, share)} for share in shares] for shares in ((0.8, 0.4), (0.5, 0.6)))
    scores = np.stack([over_seeds(one)["read"] for one in (ours, theirs)], axis=1)
    assert scores[0] == pytest.approx((0.6, 0.55))
    assert np.unique(scores[1:, 0].round(9)).tolist() == [0.4, 0.6, 0.8]
    assert ranks(scores)[0].best == pytest.approx(0.75, abs=0.03)


def test_the_file_and_the_page_have_them(found, tmp_path):
    runs, kept = found
    kept.write(epath.Path(tmp_path) / RETAINED_FILE)
    written = json.loads((tmp_path / RETAINED_FILE).read_text())
    assert written["full"] == "mlp@64" and written["points"][2]["benchmarks"]["count"]["share"]["mean"] == 50
    (tmp_path / RETAINED_FILE).unlink()
    page = report_of(tmp_path, runs, examples=[], retained=kept)
    assert isinstance(page, type(Page("").root))
    rows = {one(row.all("th")).text: row for row in one(one(page.all("section", id="retained")).all("tbody")).all("tr")}
    cells = [cell.text for cell in rows["random@4 control"].all("td")]
    share, rank = kept.points[2].overall.share, kept.points[2].overall.rank
    assert cells[0] == f"25.0 [{share.low:.1f}, {share.high:.1f}]rank 2 [2, 2], best {100 * rank.best:.0f}%"
    assert len(cells) == 5 and [cell.text for cell in rows["mlp@64"].all("td")] == ["100.0 [100.0, 100.0]"] * 5
