r"""Whether a run of the digits sweep with other seeds says the same as `results.jsonl`.

    python -m vlm_jax.cli.sweep --config=configs/sweeps/digits_token_budget.py --config.sweep.seeds='(5,6)' \
        --workdir=workdir/other_seeds
    python experiments/digits_token_budget/agreement.py workdir/other_seeds

Prints a row a task: of how many points the 95% interval of the difference of both means holds 0, and of how many pairs
of candidates at one budget, whose intervals do not touch here, the order is the same there.
"""

import argparse
import itertools
import math
import pathlib
from collections.abc import Sequence

from etils import epath

from vlm_jax.sweep.frontier import Accuracy, FrontierPoint, combine_seeds, tasks_of
from vlm_jax.train.workdir import read_lines

HERE = pathlib.Path(__file__).resolve().parent


def same_mean(one: Accuracy, other: Accuracy) -> bool:
    """Whether the 95% interval of the difference of two means holds 0.

    Like the intervals themselves, the difference is one of arcsin(sqrt(share)); its half-width is the root of the sum
    of the squares of both half-widths.
    """
    return abs(angle(one.mean) - angle(other.mean)) <= math.hypot(half_width(one), half_width(other))


def angle(share: float) -> float:
    """arcsin(sqrt(share))."""
    return math.asin(math.sqrt(share))


def half_width(accuracy: Accuracy) -> float:
    """Of the interval's longer side, since the other may be cut off at 0 or 1; in radians."""
    low, mean, high = map(angle, (accuracy.low, accuracy.mean, accuracy.high))
    return max(mean - low, high - mean)


def agreement(here: Sequence[FrontierPoint], there: Sequence[FrontierPoint], task: str) -> dict[str, tuple[int, int]]:
    """(agreeing, all) of the points that both runs have, and of the ordered pairs of those."""
    pairs = [(one, two) for one in here for two in there if one.label == two.label]
    agreeing = [same_mean(one.accuracy[task], two.accuracy[task]) for one, two in pairs]
    kept, compared = 0, 0
    for (one, one_there), (two, two_there) in itertools.permutations(pairs, 2):
        same_budget = one.runs[0]["token_budget"] == two.runs[0]["token_budget"]
        if same_budget and one.accuracy[task].low > two.accuracy[task].high:
            compared += 1
            kept += one_there.accuracy[task].mean > two_there.accuracy[task].mean
    return {"points": (sum(agreeing), len(agreeing)), "order": (kept, compared)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path, help="of a finished sweep with other seeds")
    there = read_lines(epath.Path(parser.parse_args().workdir / "results.jsonl"))
    here = read_lines(epath.Path(HERE / "results.jsonl"))
    points, others = combine_seeds(here), combine_seeds(there)
    for task in tasks_of(here):
        found = agreement(points, others, task)
        print(f"{task:12}" + "   ".join(f"{name}: {agreeing} of {count}" for name, (agreeing, count) in found.items()))
        for one in points:
            for two in others:
                if one.label == two.label and not same_mean(one.accuracy[task], two.accuracy[task]):
                    print(f"  {one.label}: {100 * one.accuracy[task].mean:.1f} and {100 * two.accuracy[task].mean:.1f}")


if __name__ == "__main__":
    main()
