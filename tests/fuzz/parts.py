"""Connectors, reducers and encoders by kind: drawn settings, grids, tiles and budgets, as sections of a config."""

import contextlib
import dataclasses
import functools
import random
import types
import typing
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import base
from tests.contracts.kinds import SIZES
from tests.fuzz.mutation import VALUES
from tests.fuzz.target import Target
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build import build
from vlm_jax.cli.process import EXPLAINED
from vlm_jax.config import hints_of, keys_of
from vlm_jax.connectors import CONNECTORS
from vlm_jax.encoders import ENCODERS, PACKED_ENCODERS
from vlm_jax.ranges import split
from vlm_jax.reducers import REDUCERS

SIDES = (1, 2, 3, 4, 5, 6, 8, 12)  # of a grid of patches
WHOLE = (*(0, -1, 1, 2, 3, 4, 5, 6, 7, 8, 16), 2**14, 2**31)
PATCH = 4
TOWER = {"patch_size": PATCH, "width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 16, "remat": "none"}
DECODER = {"width": 16, "depth": 3, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16, "remat": "none"}


def _drawn(rng: random.Random, hint: Any) -> Any:
    """A value of a type, mostly; or any other."""
    hint, _ = split(hint)
    if rng.random() < 0.03:
        return rng.choice(VALUES)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _drawn(rng, rng.choice(args))
    if origin is typing.Literal:
        return rng.choice(args)
    if origin is tuple:
        count = rng.randint(0, 4) if args[-1:] == (Ellipsis,) else len(args)
        return tuple(_drawn(rng, args[0]) for _ in range(count))
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return rng.choice(WHOLE)
    if hint is float:
        return rng.choice((0.0, 0.1, 0.5, 1.0, 1, 2.0, -1.0, 1e-9, float("inf"), float("nan")))
    if hint is str:
        return rng.choice(("gelu", "pool", "mean", "c_abstractor", "", "nearest"))
    return None if hint is type(None) else rng.choice(VALUES)


@functools.cache
def _derived(cls: Any) -> frozenset[str]:
    """Fields that a build sets."""
    found = {"features", "dtype", "param_dtype", "channels", "image_size"}
    for budget in (4, 16, 64):
        for more in ((), (3,)):  # a reducer takes the number of layers
            with contextlib.suppress(InfeasibleBudget, TypeError, AttributeError):
                found |= set(cls.for_budget(budget, (8, 8), *more))
    return frozenset(found)


def _section(rng: random.Random, table: Any, most: int) -> dict[str, Any]:
    """A kind of a table: what it needs at small sizes, and up to `most` of its other fields drawn."""
    kind = rng.choice(list(table))
    cls = table[kind]
    fields, hints, derived = keys_of(cls), hints_of(cls), _derived(cls)
    section = {"kind": kind}
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if name not in derived and (required or name == "depth"):
            section[name] = TOWER.get(name, SIZES.get(name, (2, 2)))
    open_ones = [name for name in fields if name not in derived or rng.random() < 0.05]
    for name in rng.sample(open_ones, min(rng.randint(0, most), len(open_ones))):
        section[name] = _drawn(rng, hints[name])
    return section


def _grid(rng: random.Random) -> dict[str, Any]:
    rows, cols = rng.choice(SIDES), rng.choice(SIDES)
    count = rows * cols
    budgets = (count, count, max(count // 4, 1), max(count // 9, 1), rng.randint(1, count), rng.choice((64, 0, -1)))
    return {
        "budget": rng.choice(budgets),
        "size": (PATCH * rows, PATCH * cols),
        "tiles": rng.choice(((1, 1), (1, 1), (1, 1), (1, 2))),
        "shaped": rng.random() < 0.3,
    }


def _with_connector(rng: random.Random) -> dict[str, Any]:
    return _grid(rng) | {"connector": _section(rng, CONNECTORS, 2)}


def _with_reducer(rng: random.Random) -> dict[str, Any]:
    kinds = {kind: cls for kind, cls in REDUCERS.items() if cls is not None}
    connector = rng.choice(({"kind": "mlp"}, {"kind": "mlp"}, {"kind": rng.choice(list(CONNECTORS))}))
    return _grid(rng) | {"reducer": _section(rng, kinds, 2), "connector": connector}


def _with_encoder(rng: random.Random) -> dict[str, Any]:
    kinds = {**ENCODERS, **PACKED_ENCODERS}
    return _grid(rng) | {"encoder": _section(rng, kinds, 3), "connector": {"kind": "mlp"}}


def _build(given: dict[str, Any]) -> None:
    """Builds the system; where asked, its shapes, in which the budget is to be found again."""
    config = base.get_config().unlock()
    config.token_budget, config.processor.tiles = given["budget"], given["tiles"]
    config.processor.image_size = given["size"]
    config.encoder = ConfigDict({"kind": "vit", **TOWER})
    config.decoder = ConfigDict({"kind": "transformer", **DECODER})
    with config.ignore_type():
        for name in ("encoder", "reducer", "connector"):
            if name in given:
                config[name] = ConfigDict(given[name], convert_dict=False)
        if given.get("encoder", {}).get("kind") in PACKED_ENCODERS:
            config.processor.image_size, config.processor.tiles = None, (1, 1)
    experiment = build(config)
    if not given["shaped"]:
        return
    system = experiment.system
    assert jax.tree.leaves(experiment.boxed_shapes())
    assert system.budget is not None and system.budget.left == given["budget"]


TARGETS = {
    "connectors": Target(_with_connector, _build, EXPLAINED),
    "reducers": Target(_with_reducer, _build, EXPLAINED),
    "encoders": Target(_with_encoder, _build, EXPLAINED),
}
