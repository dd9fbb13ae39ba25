"""What every connector costs at the same number of tokens; see README.md for the question and the commands."""

import argparse
import collections
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BUDGETS = (16, 64, 144, 256)
GRIDS = ((24, 24), (32, 32))  # CLIP L/14 at 336 pixels; 448 pixels
WIDTH_IN, WIDTH_OUT = 1024, 4096
# Fields that do not depend on the budget or the widths, as in the releases, except for the visual
# vocabulary: the 65,536 words of Ovis 2 with the large squares of a small budget would not fit here.
RELEASED: dict[str, dict[str, Any]] = {
    "visual_vocabulary": {"vocab_size": 16_384},
    "perceiver": {"depth": 3, "num_heads": 16, "num_kv_heads": 4, "head_dim": 96},
    "qformer": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "c_abstractor": {"depth": 3, "width": 1024},
}
COLUMNS = ("kind", "grid", "tokens", "parameters, M", "GFLOPs", "forward, ms", "of its products",
           "with backward, ms", "of its products", "peak memory, MB")  # fmt: skip


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alone(function: Callable[..., Any], *args: Any) -> Callable[[], float]:
    """Times the matrix products of a call, each as a separate program: its time, multiplied by how often it runs."""
    import jax
    import jax.numpy as jnp

    from vlm_jax.costs.flops import products

    counts: collections.Counter[str] = collections.Counter()
    programs: dict[str, Callable[[], Any]] = {}
    held = {(leaf.shape, leaf.dtype): leaf for leaf in jax.tree.leaves(args)}  # some are gigabytes
    for equation, times in products(function, *args):
        shapes = [(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
        key = f"{shapes} {equation.primitive.name} {equation.params}"
        counts[key] += times
        if key not in programs:
            for shape, dtype in shapes:
                if (shape, dtype) not in held:
                    held[shape, dtype] = jnp.full(shape, 0.01, dtype)
            operands = [held[key] for key in shapes]

            def run(*operands: jax.Array, equation: Any = equation) -> Any:
                return equation.primitive.bind(*operands, **equation.params)

            compiled = jax.jit(run).lower(*operands).compile()
            programs[key] = lambda compiled=compiled, operands=operands: jax.block_until_ready(compiled(*operands))
    for program in programs.values():
        program()
    return lambda: sum(counts[key] * seconds(program) for key, program in programs.items())


def case(kind: str, grid: tuple[int, int], budget: int, batch: int, rounds: int) -> dict[str, Any]:
    """One connector at one budget; the connector and its products alternate.

    Returns:
      Its row, or `refused`: the reason why the budget is infeasible.
    """
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from vlm_jax.budget import InfeasibleBudget
    from vlm_jax.connectors import CONNECTORS
    from vlm_jax.costs.flops import count_flops
    from vlm_jax.types import VisualFeatures

    try:
        solved = CONNECTORS[kind].for_budget(budget, grid)
    except InfeasibleBudget:
        return {"kind": kind, "grid": grid, "budget": budget, "refused": "not feasible"}
    connector = CONNECTORS[kind](features=WIDTH_OUT, **solved, **RELEASED.get(kind, {}))
    count = grid[0] * grid[1]
    features = VisualFeatures(jnp.full((batch, count, WIDTH_IN), 0.01), jnp.ones((batch, count), bool), grid)
    init = jax.eval_shape(lambda: connector.init(jax.random.key(0), features, deterministic=True))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), nn.meta.unbox(init)["params"])

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        given = VisualFeatures(tokens, features.mask, grid)
        return connector.apply({"params": params}, given, deterministic=True).tokens

    def both(params: Any, tokens: jax.Array) -> Any:
        return jax.value_and_grad(lambda *args: jnp.sum(forward(*args)), argnums=(0, 1))(params, tokens)

    row: dict[str, Any] = {"kind": kind, "grid": grid, "budget": budget}
    row["tokens"] = forward_tokens = connector.num_tokens(grid)
    assert jax.eval_shape(forward, params, features.tokens).shape == (batch, forward_tokens, WIDTH_OUT)
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    row["flops"] = count_flops(forward, params, features.tokens) // batch
    for name, function in (("forward", forward), ("both", both)):
        compiled = jax.jit(function).lower(params, features.tokens).compile()
        memory = compiled.memory_analysis()
        row[f"{name}_peak"] = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )  # fmt: skip
        products = alone(function, params, features.tokens)
        step = lambda compiled=compiled: jax.block_until_ready(compiled(params, features.tokens))  # noqa: E731
        step()
        measured = [(seconds(step), products()) for _ in range(rounds)]
        row[name] = statistics.median(whole for whole, _ in measured)
        row[f"{name}_products"] = statistics.median(part for _, part in measured)
    return row


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows in Markdown; times and memory are of the whole batch, FLOPs of one image."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        grid = f"{row['grid'][0]}x{row['grid'][1]}"
        if "refused" in row:
            lines.append(f"| {row['kind']} | {grid} | {row['budget']}: {row['refused']} |" + " |" * (len(COLUMNS) - 3))
            continue
        cells = [row["kind"], grid, str(row["tokens"]), f"{row['parameters'] / 1e6:.1f}", f"{row['flops'] / 1e9:.1f}"]
        for name in ("forward", "both"):
            cells += [f"{row[name] * 1e3:.0f}", f"{row[name] / row[f'{name}_products']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['both_peak'] / 1e6:.0f} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward time against tokens, one panel per grid, one line per kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if "refused" not in row]
    kinds = list(dict.fromkeys(row["kind"] for row in measured))
    grids = list(dict.fromkeys(tuple(row["grid"]) for row in measured))
    canvas, panels = pyplot.subplots(1, len(grids), figsize=(6 * len(grids), 5), sharey=True, squeeze=False)
    for panel, grid in zip(panels[0], grids, strict=True):
        for number, kind in enumerate(kinds):
            points = [(row["tokens"], row["forward"] * 1e3) for row in measured
                      if row["kind"] == kind and tuple(row["grid"]) == grid]  # fmt: skip
            style = {"color": f"C{number % 10}", "marker": "os^"[number // 10], "label": kind}
            panel.plot(*zip(*points, strict=True), **style)
        panel.set(
            xscale="log", yscale="log", xlabel="visual tokens of an image", title=f"{grid[0]} x {grid[1]} features"
        )
        panel.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("forward, ms for the batch")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    canvas.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", default="0,1", help="cores for all processes")
    parser.add_argument("--kinds", nargs="*", help="all of the table by default")
    parser.add_argument("--out", type=Path, default=Path("workdir/connector_cost"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    if arguments.case:
        print(json.dumps(case(*json.loads(arguments.case), arguments.batch, arguments.rounds)))
        return
    from vlm_jax.connectors import CONNECTORS

    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.json"  # existing rows are not measured again
    rows = json.loads(file.read_text()) if file.exists() else []
    for kind, grid in itertools.product(arguments.kinds or CONNECTORS, GRIDS):
        # A kind without a choice is measured at its only number.
        for budget in (grid[0] * grid[1],) if kind in ("mlp", "hybrid_mlp") else BUDGETS:
            if any((row["kind"], *row["grid"], row["budget"]) == (kind, *grid, budget) for row in rows):
                continue
            # One process per case, so that its memory is freed before the next.
            command = [sys.executable, __file__, "--case", json.dumps([kind, grid, budget])]
            command += ["--cores", arguments.cores, "--batch", str(arguments.batch), "--rounds", str(arguments.rounds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode == -signal.SIGKILL:
                rows.append({"kind": kind, "grid": grid, "budget": budget, "refused": "out of memory"})
            elif done.returncode:
                raise SystemExit(f"{kind} at {budget} tokens failed; see above")
            else:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            file.write_text(json.dumps(rows, indent=1))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    order = list(CONNECTORS)
    rows.sort(key=lambda row: (order.index(row["kind"]), *row["grid"], row["budget"]))
    (arguments.out / "table.md").write_text(table(rows) + "\n")
    figure(rows, arguments.out / "cost.png")
    slow = [
        row
        for row in rows
        if "refused" not in row and max(row[n] / row[f"{n}_products"] for n in ("forward", "both")) > 1.5
    ]
    print(
        "above 1.5 times their products: "
        + (", ".join(f"{r['kind']} {r['grid']} {r['tokens']}" for r in slow) or "none")
    )


if __name__ == "__main__":
    main()
