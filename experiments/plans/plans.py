"""Plans of released systems on two slices each, training and decoding, as a table.

    python experiments/plans/plans.py [--only=Qwen2.5-VL-3B] [--quick]

Finished plans are kept, so that a second run resumes. A plan that cannot be made has its reason in the table.
"""

import argparse
import itertools
import json
import pathlib

import jax

jax.config.update("jax_platforms", "cpu")

from vlm_jax.budget import InfeasibleBudget  # noqa: E402
from vlm_jax.cli.plan_output import working  # noqa: E402
from vlm_jax.config import ConfigError  # noqa: E402
from vlm_jax.planner.kept import FOLDER  # noqa: E402
from vlm_jax.planner.plan import Plan  # noqa: E402
from vlm_jax.planner.request import Request, Stage, make_plan  # noqa: E402
from vlm_jax.planner.settings import planned  # noqa: E402
from vlm_jax.planner.topology import PlanError, open_topology  # noqa: E402
from vlm_jax.train import finetuning  # noqa: E402

GIB = 2**30
LENGTH, ROWS = 4096, 2  # of a row, and rows of a device in training
# Release, token budget, connector, slices.
SYSTEMS = (
    ("Qwen/Qwen2.5-VL-3B-Instruct", None, None, ("v5e:4x4", "v6e:4x4")),
    ("Qwen/Qwen2.5-VL-7B-Instruct", None, None, ("v5e:8x8", "v5p:4x4x4")),
    ("Qwen/Qwen2.5-VL-72B-Instruct", None, None, ("v5p:4x4x4", "v5p:4x4x8")),
    ("deepseek-ai/deepseek-vl2-tiny", None, None, ("v5e:4x4", "v6e:4x4")),
    ("deepseek-ai/deepseek-vl2-small", None, None, ("v5e:8x8", "v5p:4x4x4")),
    ("deepseek-ai/deepseek-vl2", None, None, ("v5e:8x8", "v5p:4x4x4")),
    ("OpenGVLab/InternVL3-8B", None, None, ("v5e:8x8", "v5p:4x4x4")),
    ("AIDC-AI/Ovis2.5-9B", None, None, ("v5e:8x8", "v5p:4x4x4")),
    ("llava-hf/llava-1.5-7b-hf", None, None, ("v5e:8x8", "v5p:4x4x4")),
    ("llava-hf/llava-1.5-7b-hf", 144, "pool", ("v5e:8x8", "v5p:4x4x4")),
    ("llava-hf/llava-1.5-7b-hf", 64, "pool", ("v5e:8x8", "v5p:4x4x4")),
)
HEADER = (
    "system",
    "tokens",
    "slice",
    "stage",
    "mesh",
    "peak GiB",
    "fits",
    "ms a step",
    "MFU",
    "exposed",
    "tokens a second",
)


def request_for(release: str, topology: str, stage: Stage, *, rows: int, quick: bool = False) -> Request:
    """Rows of `LENGTH` positions, so many a device, by the default settings of fine-tuning."""
    rows *= len(open_topology(topology).devices)
    request = Request(finetuning.get_config(), topology, stage, batch_size=rows, quick=quick)
    return request.changed(release=release, row__length=LENGTH, stages__instruction__batch_size=rows)


def requests(only: str, quick: bool):
    stages: tuple[Stage, ...] = ("train", "decode")
    for name, budget, connector, slices in SYSTEMS:
        for topology, stage in itertools.product(slices, stages if only in name else ()):
            request = request_for(name, topology, stage, rows=ROWS, quick=quick).changed(token_budget=budget)
            if connector is not None:
                request = request.changed(connector__kind=connector)
            yield request if stage == "train" else with_copies(request)


def with_copies(request: Request) -> Request:
    """With copies of the model for generation, each over as few chips as hold its weights in half of their memory."""
    topology = open_topology(request.topology)
    weights = 2 * sum(planned(request.config, len(topology.devices))[1].num_params().values())  # in bfloat16
    tensor = 1
    while weights / tensor > topology.chip.hbm_bytes / 2:
        tensor *= 2
    return request.changed(mesh__data=-1, mesh__fsdp=1, mesh__tensor=tensor)


def cells(request: Request, plan: Plan | None, refused: str) -> list[str]:
    config = request.config
    name = [config.release.split("/")[1], str(config.token_budget or "as released"), request.topology, request.stage]
    sizes = {axis: size for axis, size in config.mesh.to_dict().items() if size != 1}
    name.append(", ".join(f"{axis} {'rest' if size == -1 else size}" for axis, size in sizes.items()))
    if plan is None:
        return [*name, "", refused.splitlines()[0], "", "", "", ""]
    own = plan.step_time
    found = [f"{plan.memory.peak / GIB:.1f}", "yes" if plan.memory.fits else f"{-plan.memory.spare / GIB:.1f} GiB over"]
    if own is None:
        return [*name, *found, plan.refused, "", "", ""]
    speed = f"{plan.tokens_per_second:,.0f}"
    low, high = (f"{1e3 * time:,.0f}" if time > 0.1 else f"{1e3 * time:.3g}" for time in (own.low, own.high))
    return [*name, *found, f"{low} to {high}", f"{own.mfu:.0%}", f"{own.exposed / own.seconds:.0%}", speed]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workdir", default="workdir/plans")
    given = parser.parse_args()
    folder = pathlib.Path(given.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    rows, plans = [], []
    for request in requests(given.only, given.quick):
        plan, refused = None, ""
        try:
            plan = make_plan(request, FOLDER, working)[0]
            plans.append(plan.to_json())
        except (ConfigError, InfeasibleBudget, PlanError) as error:
            refused = str(error)
        rows.append(cells(request, plan, refused))
        lines = [HEADER, ["---"] * len(HEADER), *rows]
        (folder / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
        (folder / "plans.json").write_text(json.dumps(plans))
        jax.clear_caches()  # a gigabyte a plan
    print((folder / "table.md").read_text())


if __name__ == "__main__":
    main()
