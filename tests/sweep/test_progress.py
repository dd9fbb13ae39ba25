"""Lines of progress for files, and tables whose names are whole."""

import io
import re
import time

import pytest
import rich.console

from configs.sweeps import digits_token_budget
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.progress import PointsProgress, duration, text_table
from vlm_jax.sweep.run import plan_table, results_table


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_line_is_printed_again_and_again_where_there_is_no_terminal():
    console = rich.console.Console(file=io.StringIO(), width=20)
    with PointsProgress(console, "steps", 100, 4, line_seconds=0.02) as progress:
        progress.advance("pool@1", 20, "pool@1: a long stage [b]name[/b]")  # 20 were done by an earlier process
        progress.advance("pool@1", 50, "pool@1: a long stage [b]name[/b]")
        progress.next_point()
        time.sleep(0.2)
    lines = console.file.getvalue().splitlines()
    assert len(lines) > 2
    pattern = r"1/4 points, 50/100 steps, 0:00:00, 0:00:0\d left: pool@1: a long stage \[b\]name\[/b\]"
    assert re.fullmatch(pattern, lines[-1])


def test_what_is_left_is_estimated_from_what_this_process_did():
    progress = PointsProgress(rich.console.Console(file=io.StringIO()), "steps", 1000, 1)
    progress._begun -= 100  # seconds
    progress.advance("a", 500, "")
    progress.advance("a", 600, "")
    assert "0:06:40 left" in progress.line()  # 400 steps at one a second


def test_a_live_display_on_a_terminal():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    with PointsProgress(console, "steps", 10, 2) as progress:
        progress.advance("a", 10, "a: x")
        progress.next_point()
    assert "10/10" in console.file.getvalue() and "1/2" in console.file.getvalue()


def test_tables_of_the_main_sweep_fit_80_characters():
    config = digits_token_budget.get_config()
    points = list_points(config)
    plan = plan_table(points)
    share = {"mean": 1.0, "low": 0.991, "high": 1.0, "n": 400}
    tasks = points[0].experiment.source.tasks
    costs = {"step_seconds": None, "peak_bytes": None, "command": "", "num_params": {"a": 1}, "flops": {"a": 1}}
    results = results_table(
        [
            {
                "label": point.label,
                "connector": point.connector,
                "token_budget": point.config.token_budget,
                "num_visual_tokens": point.costs.num_visual_tokens,
                "realised_visual_tokens": {"mean": point.costs.num_visual_tokens, "max": 1},
                "accuracy": dict.fromkeys(tasks, share),
                "seed": point.config.seed,
                **costs,
            }
            for point in points
        ]
    )
    for table in (plan, results):
        assert max(map(len, table.splitlines())) <= 80
    assert all(f"\n{point.label} " in plan for point in points)


def test_columns_are_as_wide_as_their_cells():
    assert text_table("t", [("name", "n"), ("a very long name of a point", "10"), ("b", "5")]).splitlines() == [
        "t",
        "name                         n",
        "a very long name of a point 10",
        "b                            5",
    ]
