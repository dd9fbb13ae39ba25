"""The laboratory of token reduction in small: four systems in one table, and the tables of the literature."""

import json
import pathlib
import sys

import numpy as np
import pytest

from vlm_jax.sweep.pages import shown

from .test_shown_results import loaded

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "reduction"
SYSTEMS = ("llava", "llava_next", "qwen2_5_vl", "internvl")
BUDGET = 2


@pytest.fixture(scope="module")
def reduction():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # as where it is run as a script
        yield loaded("reduction", FOLDER)
        sys.modules.pop("small", None)


@pytest.fixture(scope="module")
def finished(reduction, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reduction")
    arguments = ["--questions=4", "--batch_size=4", "--methods", "divprune", "tome", f"--budgets={BUDGET}"]
    assert reduction.main([f"--workdir={workdir}", *arguments]) == 0
    return workdir


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_has_every_point_of_every_system(finished):
    """What is retained is counted here from the answers; `tome` is refused, and said why."""
    rows = json.loads((finished / "table.json").read_text())
    page = (finished / "table.md").read_text()
    seen = [(row["system"], row["label"]) for row in rows if "reason" not in row]
    refused = {(row["system"], row["label"]): row["reason"] for row in rows if "reason" in row}
    for name in SYSTEMS:
        labels = {label for system, label in seen if system == name} - {"none@2"}
        assert labels == {"none@released", "random@2", "downsample_image@2", "divprune@2"}
        assert f"- {name}, tome@2: {refused[name, 'tome@2']}" in page
    assert "breaks the windows and blocks" in refused["qwen2_5_vl", "tome@2"]
    changed = 0
    for row in rows:
        if "reason" in row:
            continue
        points = finished / row["system"] / "points"
        right, whole = (
            [line["correct"] for line in lines(points / label / "answers.jsonl")]
            for label in (row["label"], "none@released")
        )
        assert sum(whole) > 0
        assert row["retained"]["mean"] == pytest.approx(100 * sum(right) / sum(whole))
        assert row["retained"]["low"] <= row["retained"]["mean"] <= row["retained"]["high"]
        assert f"| {row['system']} | `{row['method']}`" in page
        changed += right != whole
    assert changed
    whole = [row for row in rows if row["label"] == "none@released"]
    assert [row["retained"] for row in whole] == [pytest.approx({"mean": 100, "low": 100, "high": 100})] * 4
    assert [row["prefill"] for row in whole] == [1] * 4
    assert (finished / "retained.png").stat().st_size > 10_000


def test_what_is_retained_is_the_mean_over_benchmarks(reduction):
    """MME is the sum of its subtasks' scores, POPE is its F1; benchmarks with nothing to lose are left out."""

    def answer(task, number, reference, text):
        given = {"references": [reference], "question": "?", "is_finished": True, "sample_id": f"{task}{number}"}
        return {"task": task, "group": f"{number}", "text": text, **given}

    def of_texts(vqa, pope, mme, lost):
        rows = [answer("vqa", i, "a", text) for i, text in enumerate(vqa)]
        rows += [
            answer("pope", i, reference, text)
            for i, (reference, text) in enumerate(zip(("Yes", "Yes", "No"), pope, strict=True))
        ]
        rows += [answer(f"mme:{kind}", 0, "Yes", text) for kind, text in zip(("existence", "count"), mme, strict=True)]
        return reduction.replicates([*rows, answer("lost", 0, "a", lost)], {})

    whole = of_texts("aab", ("yes", "yes", "no"), ("yes", "yes"), "b")
    ours = of_texts("abb", ("yes", "yes", "yes"), ("yes", "no"), "a")
    found = reduction.retained(ours, whole)
    shares = {name: share["mean"] for name, share in found["benchmarks"].items()}
    assert shares == pytest.approx({"vqa": 50, "pope": 80, "mme": 50})
    assert found["retained"]["mean"] == pytest.approx(60)


def test_the_tables_of_the_literature_agree_with_themselves(reduction):
    """Every average is that of the scores beside it, as the paper has it; the page shows these tables."""
    literature = json.loads(reduction.LITERATURE.read_text())
    for name in ("llava", "llava_next"):
        whole = np.asarray(literature[name]["full"])
        for point in literature[name]["points"]:
            assert abs(100 * np.mean(point["scores"] / whole) - point["average"]) < 0.051, point
    assert reduction.expected([]) + "\n" == shown(FOLDER / "README.md")
    share = {"mean": 97.04, "low": 96, "high": 98.06}
    row = {"system": "llava", "label": "visionzip@64", "method": "visionzip", "budget": 64, "retained": share}
    assert "| 52.8 | 93.0 | 97.0 [96.0, 98.1] |" in reduction.expected([row])


def test_own_time_and_what_is_saved():
    """By hand: before the connector the method's time is beside the prefill, in the decoder it is a part of it."""
    prefill = loaded("prefill", FOLDER)
    calls = {name: lambda: None for name in ("whole", "short", "method", "with", "without", "drops", "first", "last")}
    taken = {"whole": 1.0, "short": 0.3, "method": 0.02, "with": 0.05, "without": 0.04}
    taken |= {"drops": 0.4, "first": 0.25, "last": 0.05}
    seconds = {calls[name]: one for name, one in taken.items()}
    beside = tuple((calls[name], sign) for name, sign in (("method", 1), ("with", 1), ("without", -1)))
    inside = tuple((calls[name], sign) for name, sign in (("drops", 1), ("first", -1), ("last", -1)))
    made = [
        prefill.Case(prefill.FULL, 0, 1000, calls["whole"]),
        prefill.Case("before", 64, 250, calls["short"], beside),
        prefill.Case("in", 64, 250, calls["drops"], inside, own_in_prefill=True),
    ]
    rows = prefill.rows_of(made, seconds)
    keys = ("promised", "speed_up", "of_promised", "own", "of_saved", "met")
    assert [rows[1][key] for key in keys] == pytest.approx([4, 1 / 0.3, 1 / 1.2, 0.03, 0.03 / 0.7, True])
    assert [rows[2][key] for key in keys] == pytest.approx([4, 2.5, 0.625, 0.1, 0.1 / 0.7, False])
    assert "| `before` | 64 | 300.0 | 3.33 | 4.00 | 0.83 | 30.00 | 4.3% | yes |" in prefill.table(rows)
