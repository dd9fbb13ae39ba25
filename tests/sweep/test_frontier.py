"""The Pareto front against its definition, and the figure's marks against the results they represent."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from etils import epath
from PIL import Image

from vlm_jax.sweep.frontier import combine_seeds, draw_frontier, frontier_figure, pareto_front, total_costs

CONTROLS = frozenset({"random"})


def result(connector, budget, accuracy, *, seed=0, encoder_flops=4e8, **replaced):
    """One line of results.jsonl; accuracy is {task: (mean, low, high)}."""
    return {
        "connector": connector,
        "token_budget": budget,
        "num_visual_tokens": budget,
        "realised_visual_tokens": {"mean": budget, "max": budget},
        "accuracy": {
            task: {"mean": mean, "low": low, "high": high, "n": 200} for task, (mean, low, high) in accuracy.items()
        },
        "num_params": {"encoder": 1_000_000, "connector": 200_000, "decoder": 2_000_000},
        "flops": {"encoder": int(encoder_flops), "connector": 1_000_000, "prefill": 5_000_000 * budget},
        "step_seconds": 0.05,
        "peak_bytes": 2**28,
        "seed": seed,
        "config_hash": "abc",
        "command": f"python -m vlm_jax.cli.sweep --only={connector}@{budget}",
    } | replaced


def test_tokens_dropped_inside_the_decoder_count_by_layer():
    """64 tokens in two layers and 4 in the third are 44 of each: more than the 4 that are left."""
    entering = {"realised_visual_tokens": {"mean": 64, "max": 64}}
    dropped = result("fastv", 4, {}, mean_visual_tokens=44.0, **entering)
    assert total_costs(dropped)["tokens"] == 44
    # Pictures of any size may have fewer tokens than the budget, which is only a bound.
    smaller = result("pool", 16, {}, mean_visual_tokens=16.0, realised_visual_tokens={"mean": 9.5, "max": 16})
    assert total_costs(smaller)["tokens"] == 9.5


RESULTS = [
    result("mlp", 64, {"read": (0.9, 0.85, 0.94), "count": (0.5, 0.43, 0.57)}),
    result("pool", 16, {"read": (0.88, 0.83, 0.92), "count": (0.6, 0.53, 0.67)}),
    result("pool", 4, {"read": (0.7, 0.63, 0.76), "count": (0.55, 0.48, 0.62)}),
    result("random", 16, {"read": (0.5, 0.43, 0.57)}),
]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_dominates(seed):
    # Few distinct numbers, so that ties of every kind occur.
    points = [tuple(map(int, row)) for row in np.random.default_rng(seed).integers(0, 6, (25, 2))]

    def dominated(a):
        return any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points)

    expected = [index for index, point in enumerate(points) if not dominated(point)]
    assert pareto_front(points) == sorted(expected, key=lambda index: (points[index][0], index))


def test_ties_of_the_front():
    assert pareto_front([]) == []
    assert pareto_front([(2, 0.5), (1, 0.5)]) == [1]  # equal values: the lower cost
    assert pareto_front([(1, 0.4), (1, 0.5)]) == [1]  # equal costs: the higher value
    assert pareto_front([(3, 0.9), (1, 0.5), (1, 0.5)]) == [1, 2, 0]  # equal in both: all of them


def test_the_front_of_something_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"point 1 is \(2.0, nan\)"):
        pareto_front([(1.0, 0.5), (2.0, math.nan)])


def bars(panel):
    """{connector: [(x, mean, low, high)]} as drawn."""
    drawn = {}
    for container in panel.containers:
        line, _, (segments,) = container.lines
        ends = [segment[:, 1].tolist() for segment in segments.get_segments()]
        drawn[container.get_label()] = [
            (x, y, low, high) for x, y, (low, high) in zip(*line.get_data(), ends, strict=True)
        ]
    return drawn


def test_every_point_is_drawn_with_its_interval_and_costs():
    figure = frontier_figure(RESULTS, controls=CONTROLS)
    assert figure.get_size_inches()[0] * figure.dpi == 1600
    panels = figure.axes
    assert [panel.get_title(loc="left").split()[0] for panel in panels] == ["read", "read", "count", "count"]
    assert [panel.get_xscale() for panel in panels] == ["log", "linear"] * 2
    assert panels[0].xaxis.get_transform().base == 2
    for task, (by_tokens, by_flops) in {"read": panels[:2], "count": panels[2:]}.items():
        for panel, cost in (
            (by_tokens, lambda r: r["num_visual_tokens"]),
            (by_flops, lambda r: (4e8 + 1e6 + 5e6 * r["token_budget"]) / 1e9),
        ):
            drawn = bars(panel)
            for name in ("mlp", "pool", "random"):
                with_task = [r for r in RESULTS if r["connector"] == name and task in r["accuracy"]]
                wanted = sorted((cost(r), *list(r["accuracy"][task].values())[:3]) for r in with_task)
                assert len(drawn[name]) == len(wanted)
                if wanted:
                    got = np.array(drawn[name])
                    np.testing.assert_allclose(got[:, 1:], np.array(wanted)[:, 1:])
                    # Equal token counts are set apart by less than a tenth of an octave.
                    tolerance = 0.1 if panel is by_tokens else 1e-9
                    np.testing.assert_allclose(np.log2(got[:, 0]), np.log2(np.array(wanted)[:, 0]), atol=tolerance)
    pool, random = bars(panels[0])["pool"][1], bars(panels[0])["random"][0]
    assert pool[0] < 16 < random[0]
    assert bars(panels[0])["mlp"][0][0] == 64


def test_the_front_is_marked_and_controls_are_dashed_and_grey():
    figure = frontier_figure(RESULTS, controls=CONTROLS)
    rings = [[line for line in panel.lines if line.get_gid() == "rings"] for panel in figure.axes]
    assert [line.get_ydata().tolist() for (line,) in rings] == [[0.7, 0.88, 0.9]] * 2 + [[0.55, 0.6]] * 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "mlp",
        "pool",
        "random (control)",
        "Pareto front",
    ]
    looks = [(line.get_linestyle(), line.get_color()) for line in legend.get_lines()[:3]]
    assert [style for style, _ in looks] == ["-", "-", "--"]
    red, green, blue = (looks[2][1][i : i + 2] for i in (1, 3, 5))
    assert red == green == blue
    assert len({color for _, color in looks}) == 3


def test_the_legend_covers_no_panel():
    figure = frontier_figure(RESULTS, controls=CONTROLS)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes)


def test_seeds_are_one_point_whose_interval_holds_their_spread():
    runs = [
        result("pool", 16, {"read": (0.74, 0.7, 0.9)}, seed=0, step_seconds=0.25),
        result("pool", 16, {"read": (0.66, 0.5, 0.75), "count": (0.5, 0.4, 0.6)}, seed=1, step_seconds=None),
    ]
    (point,) = combine_seeds(runs)
    read, count = point.accuracy["read"], point.accuracy["count"]
    assert (point.label, read.mean, read.seeds) == ("pool@16", pytest.approx(0.7), {0: 0.74, 1: 0.66})
    # One point of two seeds: Student's t with one degree of freedom, of arcsin(sqrt(share)).
    angles = np.arcsin(np.sqrt([0.74, 0.66]))
    ends = scipy.stats.t.interval(0.95, 1, angles.mean(), scipy.stats.sem(angles))
    assert (read.low, read.high) == pytest.approx(tuple(np.sin(ends) ** 2))
    assert (count.low, count.high) == (0.4, 0.6)  # one seed: that of its questions
    assert point.costs == {"tokens": 16, "flops": 481e6, "parameters": 3.2e6, "step_seconds": 0.25}


def test_results_that_cannot_be_reported_are_refused(tmp_path):
    path = epath.Path(tmp_path) / "frontier.png"
    for results, message in (
        ([], "nothing to report: 0 results"),
        ([result("pool", 16, {})], "1 results, none with an accuracy"),
        ([{"connector": "pool"}], "result 0 lacks accuracy, command, flops"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_frontier(results, path, controls=CONTROLS)
    assert list(tmp_path.iterdir()) == []


def test_ticks_stand_on_token_counts_that_have_room():
    def ticks(counts, panel):
        points = [result("pool", count, {"read": (0.5, 0.4, 0.6)}) for count in counts]
        return frontier_figure(points, controls=CONTROLS).axes[panel].get_xticks().tolist()

    assert ticks([4, 9, 144], 0) == [4, 9, 144]
    assert ticks([15, 16, 64], 0) == [8, 16, 32, 64]
    assert ticks([7], 0) == [7]
    assert ticks([4, 2000], 1) == [0.5, 1, 2, 5, 10]  # 0.42 to 10.4 GFLOPs
    assert ticks([4, 600], 1) == [0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5]  # 0.42 to 3.4
    assert ticks([1, 3_000_000], 1) == [1, 10, 100, 1000, 10000]


def test_a_token_count_of_zero_gets_a_linear_axis():
    points = [result("pool", count, {"read": (0.5, 0.4, 0.6)}) for count in (0, 8)]
    panel = frontier_figure(points, controls=CONTROLS).axes[0]
    assert panel.get_xscale() == "linear"
    assert [row[0] for row in bars(panel)["pool"]] == [0, 8]


def test_many_connectors_keep_apart_in_colour_and_shape():
    names = [f"kind_{index}" for index in range(9)] + ["random"]
    figure = frontier_figure([result(name, 16, {"vqa": (0.5, 0.4, 0.6)}) for name in names], controls=CONTROLS)
    looks = [(line.get_color(), line.get_marker()) for line in figure.legends[0].get_lines()[:-1]]
    assert len(looks) == 10
    assert all(a != b for a, b in itertools.combinations(looks, 2))


@pytest.mark.parametrize("results", [RESULTS, RESULTS[:1]], ids=["several", "one"])
def test_the_picture_is_1600_wide_and_replaces_an_earlier_one(tmp_path, results):
    path = epath.Path(tmp_path) / "frontier.png"
    path.write_text("an earlier one")
    draw_frontier(results, path, controls=CONTROLS)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1600
    assert [file.name for file in tmp_path.iterdir()] == ["frontier.png"]


def test_many_connectors_at_one_budget_stay_near_it():
    line = next(r for r in RESULTS if r["num_visual_tokens"] == 16)
    crowd = [{**line, "connector": f"kind_{number}"} for number in range(20)]
    panel = frontier_figure(crowd, controls=frozenset()).axes[0]
    places = np.log2(sorted(bars(panel)[f"kind_{number}"][0][0] for number in range(20)))
    np.testing.assert_allclose(places, np.linspace(3.8, 4.2, 20), atol=1e-9)
