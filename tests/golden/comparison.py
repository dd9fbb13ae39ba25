"""Compares what we compute with what an official implementation returned.

A golden folder holds `golden.json` (the manifest: role, shape, dtype and tolerance of every array),
`cases.npz` (the arrays) and what the system needs besides (config, weights, tokenizer). A system is a
module with `outputs(folder, inputs)`, which returns every output array by name, and optionally
`NOT_COMPARED`, which says of regular expressions for names why they are left out, or `not_compared(golden)`, which says
it for one folder.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "golden.json"
CASES = "cases.npz"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One folder's arrays.

    Attributes:
      folder: where it is.
      system: which module reads it.
      inputs: arrays by name.
      expected: outputs of the official implementation by name.
      entries: the manifest's lines, by name of the array.
    """

    folder: Path
    system: str
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    entries: dict[str, dict[str, Any]]


def find(root: Path) -> list[Path]:
    """Every golden folder at or below `root`, sorted.

    Raises:
      FileNotFoundError: there is none.
    """
    folders = sorted(path.parent for path in root.rglob(MANIFEST))
    if not folders:
        raise FileNotFoundError(f"{root}: no folder with a {MANIFEST} here")
    return folders


def read(folder: Path) -> Golden:
    """Reads a folder.

    Raises:
      ValueError: manifest and arrays disagree; lists every disagreement.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    entries = manifest["arrays"]
    with np.load(folder / CASES, allow_pickle=False) as cases:
        arrays = {name: cases[name] for name in cases.files}
    problems = [f"{name}: in {MANIFEST}, not in {CASES}" for name in entries if name not in arrays]
    problems += [f"{name}: in {CASES}, not in {MANIFEST}" for name in arrays if name not in entries]
    for name in sorted(entries.keys() & arrays.keys()):
        told = (tuple(entries[name]["shape"]), entries[name]["dtype"])
        if told != (arrays[name].shape, str(arrays[name].dtype)):
            problems.append(f"{name}: {told} in {MANIFEST}, {arrays[name].shape, str(arrays[name].dtype)} in {CASES}")
        if entries[name]["role"] not in ("input", "output"):
            problems.append(f"{name}: unknown role {entries[name]['role']!r}")
    if problems:
        raise ValueError(f"{folder}: {MANIFEST} and {CASES} disagree:\n  " + "\n  ".join(problems))
    roles = {
        role: {name: arrays[name] for name in entries if entries[name]["role"] == role} for role in ("input", "output")
    }
    return Golden(folder, manifest["system"], roles["input"], roles["output"], entries)


def failures(golden: Golden, systems: Mapping[str, Any]) -> list[str]:
    """Runs the folder's system; one line for every output that is wrong or unaccounted for."""
    if golden.system not in systems:
        known = ", ".join(sorted(systems)) or "none"
        return [f"no module is registered for the system '{golden.system}'; registered: {known}"]
    module = systems[golden.system]
    found = module.outputs(golden.folder, dict(golden.inputs))
    own = module.not_compared(golden) if hasattr(module, "not_compared") else {}
    return compare_all(golden, found, {**getattr(module, "NOT_COMPARED", {}), **own})


def compare_all(golden: Golden, found: Mapping[str, Any], not_compared: Mapping[str, str]) -> list[str]:
    """One line for every output that is wrong, missing, excused without a reason, or unknown."""
    lines = [
        f"NOT_COMPARED['{pattern}'] gives no reason" for pattern, reason in not_compared.items() if not reason.strip()
    ]
    compared = 0
    for name, theirs in golden.expected.items():
        excused = [pattern for pattern in not_compared if re.fullmatch(pattern, name)]
        if name in found and excused:
            lines.append(f"{name}: returned, and yet excused by NOT_COMPARED['{excused[0]}']; remove one")
        elif name in found:
            compared += 1
            if line := compare(golden.entries[name], found[name], theirs):
                lines.append(f"{name}: {line}")
        elif not excused:
            lines.append(f"{name}: not returned, and no entry of NOT_COMPARED says why")
    lines += [
        f"{name}: returned, but {'an input' if name in golden.inputs else 'unknown to the manifest'}"
        for name in found
        if name not in golden.expected
    ]
    if not compared:
        lines.append("no output at all was compared")
    return lines


def compare(entry: Mapping[str, Any], ours: Any, theirs: np.ndarray) -> str | None:
    """What is wrong with `ours`, or None where it holds to the manifest's tolerance.

    Args:
      entry: the manifest's line: `atol`, `rtol`, and `scaled` where the tolerance is relative to the
        largest element; or the tolerance in words at the end of `meaning`, as a share of the largest element.
      ours: a NumPy or JAX array; its shape and its kind (float, integer, boolean, text) must be those
        of `theirs`, the width of its dtype may differ.
      theirs: the expected array.
    """
    ours = np.asarray(ours)
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, expected {theirs.shape}"
    if _kind(ours) != _kind(theirs):
        return f"{_kind(ours)} ({ours.dtype}), expected {_kind(theirs)} ({theirs.dtype})"
    atol, rtol = entry.get("atol"), entry.get("rtol", 0.0)
    if _kind(theirs) == "float" and not (atol or rtol) and (share := _share_of_largest(entry)):
        atol = share * float(np.abs(theirs).max(initial=0.0))
    if _kind(theirs) == "float" and atol is None:
        return "the manifest gives no tolerance for a float array"
    if _kind(theirs) in ("text", "boolean") or not (atol or rtol):
        # Not by way of float64, which cannot hold every 64-bit integer.
        same = (ours == theirs) | _both_nan(ours, theirs)
        return None if same.all() else _describe(~same, ours, theirs, "must be equal")
    return _compare_numbers(ours, theirs, float(atol or 0.0), float(rtol), bool(entry.get("scaled", False)))


def step(entry: Mapping[str, Any]) -> int:
    """Which tokens an array holds, by the manifest: `every 3rd SAM token`; all of them where it does not say."""
    found = re.search(r"every (\d+)(?:st|nd|rd|th)", entry["meaning"])
    return int(found.group(1)) if found else 1


def named_pictures(meaning: str) -> list[int]:
    """The numbers of the images that a text names, in its order: `image 3`, `images 0, 2 and 1`."""
    runs = re.findall(r"\bimages? (\d+(?:(?:,|,? and) \d+)*)", meaning)
    return [int(number) for run in runs for number in re.findall(r"\d+", run)]


def pictures(entry: Mapping[str, Any], counts: Sequence[int]) -> list[list[int]]:
    """The numbers of the images of every row, by the manifest: `row 0: images 0 and 2; row 1: text only`.

    Args:
      entry: the manifest's line of the ids.
      counts: how many images each row shows. Where the manifest names none, they are the first ones in order;
        where it does not tell the rows apart, each takes its share of those that it names.

    Raises:
      ValueError: a row shows more than are named.
    """
    meaning = entry["meaning"]
    parts = re.split(r"\brow \d+:", meaning)[1:]
    if not named_pictures(meaning):
        parts, numbers = [], list(range(sum(counts)))
    else:
        numbers = named_pictures(meaning)
    if len(parts) == len(counts):
        rows = [named_pictures(part)[:count] for part, count in zip(parts, counts, strict=True)]
    else:
        remaining = iter(numbers)
        rows = [list(itertools.islice(remaining, count)) for count in counts]
    if [len(row) for row in rows] != list(counts):
        raise ValueError(f"rows show {list(counts)} images, and the manifest names {rows}: {meaning}")
    return rows


def _share_of_largest(entry: Mapping[str, Any]) -> float | None:
    """The tolerance, as a share of the largest element, of a manifest that gives it in the meaning alone."""
    found = re.search(r"max abs diff <= ([\d.e-]+) \* max$", entry.get("meaning", ""))
    return float(found.group(1)) if found else None


def _compare_numbers(ours: np.ndarray, theirs: np.ndarray, atol: float, rtol: float, scaled: bool) -> str | None:
    with np.errstate(all="ignore"):
        ours64, theirs64 = ours.astype(np.float64), theirs.astype(np.float64)
        magnitude = np.where(np.isfinite(theirs64), np.abs(theirs64), 0.0)
        if scaled:
            allowed = np.broadcast_to(atol * max(1.0, magnitude.max(initial=0.0)), theirs.shape)
            rule = f"atol {atol:g} * max(1, {magnitude.max(initial=0.0):.4g})"
        else:
            allowed = atol + rtol * magnitude
            rule = f"atol {atol:g} + rtol {rtol:g} * |expected|"
        # Infinities and NaN hold where both have the same one; else the difference is NaN or infinite.
        same = (ours64 == theirs64) | _both_nan(ours64, theirs64)
        holds = same | (np.abs(ours64 - theirs64) <= allowed)
    if holds.all():
        return None
    return _describe(~holds, ours, theirs, rule)


def _describe(wrong: np.ndarray, ours: np.ndarray, theirs: np.ndarray, rule: str) -> str:
    """How many elements are wrong, and the worst of them."""
    if _kind(theirs) in ("float", "integer"):
        with np.errstate(all="ignore"):
            difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        difference = np.where(wrong, np.where(np.isnan(difference), np.inf, difference), -1.0)
        worst = np.unravel_index(np.argmax(difference), wrong.shape)
        size = f", difference {difference[worst]:.4g}"
    else:
        worst = np.unravel_index(np.argmax(wrong), wrong.shape)
        size = ""
    place = f" at {tuple(int(i) for i in worst)}" if wrong.ndim else ""
    return (
        f"{int(wrong.sum())} of {wrong.size} wrong ({rule}); worst{place}: "
        f"{ours[worst]!s}, expected {theirs[worst]!s}{size}"
    )


def _both_nan(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    if _kind(theirs) != "float":
        return np.zeros(theirs.shape, bool)
    return np.isnan(ours) & np.isnan(theirs)


def _kind(array: np.ndarray) -> str:
    kinds = {"f": "float", "i": "integer", "u": "integer", "b": "boolean", "U": "text"}
    if array.dtype.name == "bfloat16":
        return "float"
    return kinds.get(array.dtype.kind, f"dtype {array.dtype}")
