"""Prefill of a LLaVA of 100 M parameters on a CPU at 576, 192 and 64 visual tokens; see README.md.

    python experiments/reduction/prefill.py --rounds=9

Every method is measured at every budget: the prefill of the language model, from embeddings to the logits of the last
position and the cache, and the method's own time. All programs are in one process, on the same cores; they alternate,
one call each a round, in a new order each round, and medians are told.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tests.contracts import releases  # noqa: E402
from vlm_jax.costs.flops import count_flops  # noqa: E402
from vlm_jax.generation.engine import prepared  # noqa: E402
from vlm_jax.layers.per_layer import of_layers  # noqa: E402
from vlm_jax.models.vlm import flat_images  # noqa: E402
from vlm_jax.pretrained import Pretrained  # noqa: E402
from vlm_jax.sweep.pages import markdown  # noqa: E402
from vlm_jax.types import Params  # noqa: E402

# 97.5 M parameters in the language model. The tower has the width and the patches of CLIP-L/14-336, but two layers, of
# which the second gives the attention; prefill does not include it.
TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3,
         "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
TEXT = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 8192,
        "max_position_embeddings": 4096}  # fmt: skip
TINY_TOWER = {**TOWER, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 24,
              "patch_size": 4}  # fmt: skip
TINY_TEXT = {**TEXT, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 320}  # fmt: skip
BUDGETS, TINY_BUDGETS = (192, 64), (12, 4)
BEFORE = ("random", "visionzip", "prumerge", "divprune", "fastervlm", "vispruner", "holov")
METHODS = (*BEFORE, "fastv", "pyramid_drop", "dart", "sparsevlm")
QUESTION = "What is in the picture? Answer in a word or a phrase."  # a token a byte, as the template
FULL = "all tokens"
LEAST_SPEED, MOST_OWN = 0.8, 0.05  # of what FLOPs promise; of the prefill that is saved
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A method at a budget.

    Attributes:
      method, budget: of which it is.
      flops: of its prefill.
      prefill: runs it.
      own: what is added to get the method's own time: (calls, sign) of medians that are summed.
      own_in_prefill: the method's time is part of the prefill.
    """

    method: str
    budget: int
    flops: int
    prefill: Call
    own: tuple[tuple[Call, int], ...] = ()
    own_in_prefill: bool = False


def release_of(folder: pathlib.Path, tiny: bool) -> Pretrained:
    """A LLaVA with random weights, with the files of the small one."""
    tower, text = (TINY_TOWER, TINY_TEXT) if tiny else (TOWER, TEXT)
    side, small = tower["image_size"], releases.FOLDERS["llava"]
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    config = {**small.config, "vision_config": tower, "text_config": text}
    releases.FOLDERS["measured"] = dataclasses.replace(small, config=config, files={"preprocessor_config.json": crop})
    return releases.make("measured", folder)


def batch_of(model: Pretrained, side: int) -> Any:
    """One prompt with one picture."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    picture = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    return model.processor.batch([messages], [[picture]])


def compiled(function: Callable[..., Any], *arguments: Any) -> Call:
    """A call of the compiled function that waits for its result."""
    arguments = jax.device_put(arguments)
    run = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(run(*arguments))


def of_decoder(decoder: Any, variables: Params, given: Any) -> Any:
    """Logits of the last position, and the cache."""

    def run(module: Any, given: Any) -> Any:
        cache = module.init_cache(given.x.shape[0], given.x.shape[1], None, places=given.places)
        hidden, written = module(given.x, given.positions, given.segment_ids, cache, places=given.places)
        return module.logits(hidden[:, -1]), written

    return decoder.apply({"params": variables}, given, method=run)


def span(decoder: Any, params: Params, given: Any, layers: tuple[int, int], length: int) -> Call:
    """The prefill of some of the layers over so many positions: what a drop leaves, without the drop."""
    decoder = decoder.clone(depth=layers[1] - layers[0], drops=())
    params = {**params, "blocks": of_layers(params["blocks"], slice(*layers))}
    rows = {name: getattr(given, name)[:, :length] for name in ("x", "positions", "segment_ids")}
    return compiled(functools.partial(of_decoder, decoder), params, given._replace(places=None, **rows))


def cases(model: Pretrained, methods: Sequence[str], budgets: Sequence[int]) -> list[Case]:
    """Every method at every budget, and all tokens first."""
    side = model.processor.views.tile_shape[0]
    encoder, whole = model.module.encoder, None
    params, made = jax.device_put(prepared(model.params)["decoder"]), []
    encoders: dict[Any, Call] = {}  # of the methods that need the same attention
    for method, budget in [(FULL, 0), *((method, budget) for method in methods for budget in budgets)]:
        reduced = model if method == FULL else model.with_budget(budget, reducer=method)
        module, batch = reduced.module, batch_of(reduced, side)
        given = jax.jit(lambda p, b, m=module: m.apply({"params": p}, b, method="embed"))(reduced.params, batch)
        whole = given if whole is None else whole
        decoder = module.decoder  # of whichever method, with the same parameters
        call = functools.partial(of_decoder, decoder)
        prefill, flops = compiled(call, params, given), count_flops(call, params, given)
        own: list[tuple[Call, int]] = []
        if method != FULL and decoder.drops:
            lengths = [given.x.shape[1], *given.places.lengths]
            ends = [0, *(drop.layer for drop in decoder.drops), decoder.depth]
            own = [(prefill, 1)]
            spans = zip(itertools.pairwise(ends), lengths, strict=True)
            own += [(span(decoder, params, whole, layers, length), -1) for layers, length in spans]
        elif method != FULL:
            images, of_encoder = flat_images(batch.images), {"params": reduced.params["encoder"]}
            for one in (encoder, module.encoder):
                if one not in encoders:
                    encoders[one] = compiled(one.apply, of_encoder, images)
            alone = functools.partial(module.reducer.apply, {}, deterministic=True)
            own = [(compiled(alone, encoders[module.encoder]()), 1)]
            if module.encoder != encoder:  # attention that the method needs of the last block
                own += [(encoders[module.encoder], 1), (encoders[encoder], -1)]
        made.append(Case(method, budget, flops, prefill, tuple(own), bool(decoder.drops)))
    return made


def measured(made: Sequence[Case], rounds: int) -> dict[Call, float]:
    """The median seconds of every call, which alternate."""
    calls = list(dict.fromkeys(call for case in made for call in (case.prefill, *(call for call, _ in case.own))))
    seconds: dict[Call, list[float]] = {call: [] for call in calls}
    order = random.Random(0)
    for number in range(rounds + 1):
        order.shuffle(calls)
        for call in calls:
            begun = time.perf_counter()
            call()
            if number:  # the first round warms up
                seconds[call].append(time.perf_counter() - begun)
    return {call: statistics.median(times) for call, times in seconds.items()}


def rows_of(made: Sequence[Case], seconds: Mapping[Call, float]) -> list[dict[str, Any]]:
    """Rows of `prefill.json`: seconds, speed-ups, and whether the targets are met."""
    first, rows = made[0], []
    whole = seconds[first.prefill]
    for case in made:
        taken, own = seconds[case.prefill], sum(sign * seconds[call] for call, sign in case.own)
        row = {"method": case.method, "budget": case.budget, "seconds": taken, "flops": case.flops}
        if case is not first:
            saved = whole - taken + (own if case.own_in_prefill else 0)
            promised, speed_up = first.flops / case.flops, whole / taken
            row |= {"promised": promised, "speed_up": speed_up, "of_promised": speed_up / promised}
            row |= {"own": own, "of_saved": own / saved if saved > 0 else None}
            row["met"] = speed_up >= LEAST_SPEED * promised and saved > 0 and own <= MOST_OWN * saved
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, in milliseconds."""
    head = [
        "method",
        "tokens",
        "prefill, ms",
        "speed-up",
        "by FLOPs",
        "ratio",
        "own time, ms",
        "of what is saved",
        "met",
    ]
    cells = []
    for row in rows:
        name, start = row["method"], f"{1000 * row['seconds']:.1f}"
        if "met" not in row:
            cells.append([name, "", start, *[""] * 6])
            continue
        share = "" if row["of_saved"] is None else f"{100 * row['of_saved']:.1f}%"
        ratios = [f"{row[key]:.2f}" for key in ("speed_up", "promised", "of_promised")]
        met = "yes" if row["met"] else "no"
        cells.append([f"`{name}`", f"{row['budget']}", start, *ratios, f"{1000 * row['own']:.2f}", share, met])
    return markdown(head, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and writes `prefill.json` and `prefill.md` into --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int)
    parser.add_argument("--tiny", action="store_true", help="a few parameters, to try the command")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    budgets = args.budgets or (TINY_BUDGETS if args.tiny else BUDGETS)
    with tempfile.TemporaryDirectory() as folder:
        model = release_of(pathlib.Path(folder), args.tiny)
        made = cases(model, args.methods, budgets)
        rows = rows_of(made, measured(made, args.rounds))
    print(table(rows))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "prefill.json").write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "prefill.md").write_text(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
