"""Finished plans, kept by a hash of what they depend on."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from vlm_jax.paths import absolute
from vlm_jax.planner.memory import Memory, Share
from vlm_jax.planner.plan import Moved, Plan
from vlm_jax.planner.predict import Estimate
from vlm_jax.planner.topology import libtpu_version
from vlm_jax.plugins import GROUP
from vlm_jax.types import Fields

FOLDER = "~/.cache/vlm_jax/plans"
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment variables that the compilers read
HASHED = (".py", ".json")  # of a package: its source files, and released configs


def kept_plan(asked: Fields, make: Callable[[], Plan], folder: str | None) -> tuple[Plan, bool]:
    """A plan that was made before, or a new one, which is kept.

    Args:
      asked: everything that was asked for, as JSON types.
      make: makes it.
      folder: of finished plans; None keeps none.

    Returns:
      The plan, and whether it was made before.
    """
    if folder is None:
        return make(), False
    path = pathlib.Path(absolute(folder)) / f"{plan_hash(asked)}.json"
    if path.exists():
        return plan_of(json.loads(path.read_text(encoding="utf-8"))), True
    plan = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(plan.to_json(), file)
    os.replace(file.name, path)
    return plan, False


def plan_hash(asked: Fields) -> str:
    """A hash of what was asked, of the files of this package and plug-ins, and of compilers' versions and flags."""
    names = ("jax", "jaxlib", "flax", "optax")
    versions = {name: importlib.metadata.version(name) for name in names} | {"libtpu": libtpu_version()}
    flags = {name: os.environ.get(name, "") for name in FLAGS}
    given = {"asked": asked, "versions": versions, "flags": flags, "files": _files_hash()}
    text = json.dumps(given, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _files_hash() -> str:
    """A hash of the source files and included configs of this package and of plug-ins: each may change the program."""
    found = hashlib.sha256()
    for package in sorted({"vlm_jax", *(point.module.split(".")[0] for point in entry_points(group=GROUP))}):
        for name, path in _files(package).items():
            found.update(name.encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def _files(package: str) -> dict[str, pathlib.Path]:
    """{name in the package: file} of an installed package, or of its single module; none where it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        return {package: pathlib.Path(str(spec.origin))}
    roots = map(pathlib.Path, spec.submodule_search_locations)
    found = {
        f"{package}/{path.relative_to(root)}": path
        for root in roots
        for path in root.rglob("*")
        if path.suffix in HASHED and path.is_file()
    }
    return dict(sorted(found.items()))


def plan_of(fields: Fields) -> Plan:
    """The plan of `Plan.to_json`."""
    given: Any = dict(fields)
    given["memory"] = Memory(**given["memory"])
    for key in ("parameters", "temporaries"):
        given[key] = tuple(Share(**one) for one in given[key])
    if given["moved"] is not None:
        given["moved"] = tuple(Moved(**{**one, "axes": tuple(one["axes"])}) for one in given["moved"])
    if given["step_time"] is not None:
        given["step_time"] = Estimate(**given["step_time"])
    given["assumptions"] = tuple(given["assumptions"])
    return Plan(**{field.name: given[field.name] for field in dataclasses.fields(Plan)})
