"""python -m vlm_jax.cli.plan --release=NAME|--config=configs/X.py --topology=v5p:4x4x4 [--stage=train|prefill|decode]

Compiles the step for a TPU slice on this machine's CPU, and prints what it takes of it: memory, communication and an
estimate of its time. No weight is made, and no data is read.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
from absl import flags
from etils import epath

from vlm_jax.cli import command, numbers
from vlm_jax.cli.plan_output import plan_tables, search_tables, sweep_tables, working
from vlm_jax.config import ConfigError
from vlm_jax.paths import absolute
from vlm_jax.planner.kept import FOLDER
from vlm_jax.planner.plan import Plan
from vlm_jax.planner.request import Request, make_plan
from vlm_jax.planner.search import find_largest, search
from vlm_jax.ranges import Size
from vlm_jax.sweep.planned import RELEASED, joined, planned_points, write_joined_report, write_plans
from vlm_jax.sweep.run import RESULTS_FILE
from vlm_jax.train import finetuning
from vlm_jax.train.workdir import read_lines
from vlm_jax.types import Fields

RELEASE = flags.DEFINE_string(
    "release", None, "An included released config, as Qwen/Qwen2.5-VL-7B-Instruct, or a folder; config.release."
)
TOPOLOGY = flags.DEFINE_list("topology", [], "The slice, as v5e:4x4 or v5p:4x4x4; several with --sweep.")
STAGE = flags.DEFINE_enum("stage", "train", ["train", "prefill", "decode"], "A training step, or one of generation.")
TOKEN_BUDGET = numbers.define("token_budget", Size, None, "Visual tokens of an image; config.token_budget.")
BATCH_SIZE = numbers.define("batch_size", Size, None, "Rows of a step over all devices; one a shard if unset.")
LENGTH = numbers.define("length", Size, None, "Positions of a row; config.row.length.")
PICTURES = numbers.define("pictures", Size, 1, "Pictures of a row, where config.row.images is not set.")
CONTEXT = numbers.define(
    "context", Size, None, "Slots of a row's cache in generation; the prompt and a quarter of it if unset."
)
SWEEP = flags.DEFINE_bool("sweep", False, "Plan all of --budgets, --connectors and --topology; into --workdir.")
BUDGETS = flags.DEFINE_list("budgets", [], "Visual tokens of an image, with --sweep.")
CONNECTORS = flags.DEFINE_list(
    "connectors", [], f"Connectors, with --sweep; {RELEASED}, which is the default, is the release's own."
)
JOIN = flags.DEFINE_string(
    "join", None, "With --sweep, the workdir of a finished sweep or evaluation, to join with plans of the first slice."
)
SEARCH = flags.DEFINE_bool("search", False, "Try meshes and remat policies, and rank those that fit.")
LARGEST = flags.DEFINE_bool("largest_batch", False, "Find the most rows of generation that fit.")
MEMORY_ONLY = flags.DEFINE_bool("memory_only", False, "Compile faster, for the memory alone, without a time.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
PLANS = flags.DEFINE_string("plans", FOLDER, "Folder of finished plans, by what they depend on; empty for none.")


WIDTH = 120  # of tables that are not on a terminal


def main() -> None:
    """Plans what the flags ask for; exit status 1 where the plan, or every one of a search, does not fit."""
    jax.config.update("jax_platforms", "cpu")  # where the compiler runs; the slice is only described
    request = requested()
    if SWEEP.value:
        _sweep(request)
    elif SEARCH.value:
        found = search(request, _folder(), working)
        _print([dataclasses.asdict(one) for one in found], search_tables(found))
        if not any(one.plan is not None and one.plan.memory.fits for one in found):
            sys.exit(1)
    elif LARGEST.value:
        _largest(request)
    else:
        plan = _made(request)
        _print(plan.to_json(), plan_tables(plan))
        if not plan.memory.fits:
            sys.exit(1)


def requested() -> Request:
    """The request of the flags.

    Raises:
      ConfigError: flags that exclude each other, or a value that fits no key.
    """
    if not TOPOLOGY.value or (len(TOPOLOGY.value) > 1 and not SWEEP.value):
        raise ConfigError("--topology: expected one slice, as v5e:4x4 or v5p:4x4x4 (several with --sweep)")
    if sum((SWEEP.value, SEARCH.value, LARGEST.value)) > 1:
        raise ConfigError("--sweep, --search and --largest_batch: expected at most one of them")
    if SEARCH.value and STAGE.value != "train":
        raise ConfigError("--search: is for training; pass --stage=train")
    if CONTEXT.value is not None and STAGE.value == "train":
        raise ConfigError("--context: is for generation; pass --stage=prefill or --stage=decode")
    named = {"--budgets": BUDGETS.value, "--connectors": CONNECTORS.value, "--join": JOIN.value}
    lost = [name for name, value in named.items() if value]
    if lost and not SWEEP.value:
        raise ConfigError(f"{', '.join(lost)}: of --sweep only; pass --sweep")
    if LARGEST.value and STAGE.value == "train":
        raise ConfigError("--largest_batch: is for generation; pass --stage=prefill or --stage=decode")
    config = command.CONFIG.value
    if RELEASE.value is None and config.release is None and command.config_path() == finetuning.__file__:
        raise ConfigError("--release: expected an included config or a folder, or a --config, got neither")
    stage: Any = STAGE.value
    request = Request(config, TOPOLOGY.value[0], stage, BATCH_SIZE.value, CONTEXT.value, PICTURES.value)
    request = dataclasses.replace(request, quick=MEMORY_ONLY.value)
    given = {"release": RELEASE.value, "token_budget": TOKEN_BUDGET.value, "row__length": LENGTH.value}
    if STAGE.value == "train" and BATCH_SIZE.value is not None:
        given |= {f"stages__{label}__batch_size": BATCH_SIZE.value for label in config.schedule[-1:]}
    return request.changed(**{path: value for path, value in given.items() if value is not None})


def _folder() -> str | None:
    return PLANS.value or None


def _made(request: Request) -> Plan:
    return make_plan(request, _folder(), working)[0]


def _print(fields: Any, tables: Sequence[Any]) -> None:
    if JSON.value:
        print(json.dumps(fields))
        return
    width = None if sys.stdout.isatty() else WIDTH
    console = rich.console.Console(markup=False, highlight=False, width=width)
    for table in tables:
        console.print(table)


def _largest(request: Request) -> None:
    plan = find_largest(request, _made)
    _print({"largest_batch": plan.rows, "plan": plan.to_json()}, plan_tables(plan))


def _sweep(request: Request) -> None:
    """Plans the product, writes its files, and joins it with a finished sweep."""
    if command.WORKDIR.value is None:
        raise ConfigError("--workdir: expected the folder of the sweep's files; pass one")
    folder, results = command.workdir(), [] if JOIN.value is None else _results(JOIN.value)
    budgets = numbers.integers(BUDGETS.value, "budgets") or (request.config.token_budget,)
    given: dict[str, Any] = {"connectors": CONNECTORS.value or [RELEASED], "topologies": TOPOLOGY.value}
    points = list(planned_points(request, _made, budgets=budgets, **given))
    written = write_plans(points, folder)
    if JOIN.value is not None:
        found = joined(results, points, TOPOLOGY.value[0])
        written.append(write_joined_report(found, folder, title=f"Accuracy against chip time on {TOPOLOGY.value[0]}"))
    _print([point.to_json() for point in points], sweep_tables(points))
    print("\n".join(str(path) for path in written), file=sys.stderr)


def _results(name: str) -> list[Fields]:
    """The lines of a finished sweep or evaluation.

    Raises:
      ConfigError: there are none.
    """
    path = epath.Path(absolute(name)) / RESULTS_FILE
    try:
        found = read_lines(path)
    except ValueError as error:
        raise ConfigError(f"--join: {error}") from error
    if not found or any({"connector", "token_budget"} - set(line) for line in found):
        raise ConfigError(
            f"--join: expected the workdir of a finished sweep or evaluation; {path} has no results of one"
        )
    return found


if __name__ == "__main__":
    command.run(main, default_config=finetuning.__file__, needs_workdir=False)
