"""Ids, labels, positions and packs of training conversations, as the releases' own fine-tuning code makes them.

Every case is made twice: by default, and with `targets="as_released"`, which keeps the release's faults. Where
`train_label_rules` names a difference, the second is compared; where there is no second, the rule's reason is that of
`not_compared`.
"""

import contextlib
import json
from pathlib import Path

import numpy as np

from tests.golden import comparison
from tests.golden.systems import train_label_families, train_label_rules
from tests.golden.systems.train_label_families import Case, MissingCase


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of every case, and of the batches and packs of several."""
    golden = comparison.read(folder)
    listed = json.loads((folder / "conversations.json").read_text())
    family = train_label_families.family(golden.system)(folder, listed["arguments"])
    found, made = {}, {}
    for entry in listed["cases"]:
        case = Case(entry, inputs, golden.expected)
        stem = f"case{entry['case']}"
        if f"{stem}.labels" not in golden.expected:
            continue
        named = train_label_rules.difference(golden.system, family, case) is not None
        family.named |= {entry["case"]} if named else set()
        theirs = family.arrays(case, as_released=True) if family.as_released(case) else None
        ours = theirs if named else family.arrays(case)
        if theirs and not _same(theirs, case):
            ours = theirs  # kept faults differ nowhere else
        made[entry["case"]] = ours
        found |= {f"{stem}.{key}": array for key, array in (ours or {}).items()}
    for several in (family.batches, family.packs):
        with contextlib.suppress(MissingCase):
            found |= several(made, golden)
    return {name: array for name, array in found.items() if name in golden.expected}


def _same(arrays: dict[str, np.ndarray], case: Case) -> bool:
    """Whether arrays are those of the release."""
    stem = f"case{case.entry['case']}"
    return all(
        np.array_equal(array, case.expected[f"{stem}.{key}"])
        for key, array in arrays.items()
        if f"{stem}.{key}" in case.expected
    )


def differing(folder: Path) -> set[train_label_rules.Rule]:
    """Rules that are needed: a conversation is refused by default, or its arrays differ."""
    golden = comparison.read(folder)
    listed = json.loads((folder / "conversations.json").read_text())
    family = train_label_families.family(golden.system)(folder, listed["arguments"])
    found = set()
    for entry in listed["cases"]:
        case = Case(entry, golden.inputs, golden.expected)
        if f"case{entry['case']}.labels" not in golden.expected:
            continue
        rule = train_label_rules.difference(golden.system, family, case)
        if rule is None or rule in found:
            continue
        try:
            different = not _same(family.arrays(case), case)
        except ValueError:
            different = True
        found |= {rule} if different else set()
    return found


def not_compared(golden: comparison.Golden) -> dict[str, str]:
    """Reasons of the arrays that `outputs` does not return, by name."""
    listed = json.loads((golden.folder / "conversations.json").read_text())
    family = train_label_families.family(golden.system)(golden.folder, listed["arguments"])
    reasons, missing = {}, set()
    for entry in listed["cases"]:
        case = Case(entry, golden.inputs, golden.expected)
        if f"case{entry['case']}.labels" not in golden.expected:
            continue
        rule = train_label_rules.difference(golden.system, family, case)
        if rule is not None and not family.as_released(case):
            reasons |= {name: rule.reason for name in golden.expected if name.startswith(f"case{entry['case']}.")}
            missing.add(entry["case"])
    for which, prefix in (("batch_of", "batch"), ("pack_of", "pack")):
        if missing & set(listed["arguments"].get(which, ())):
            told = "a conversation of it is not compared"
            reasons |= {name: told for name in golden.expected if name.startswith(prefix)}
    return {name.replace(".", r"\."): reason for name, reason in reasons.items()} | family.NOT_COMPARED
