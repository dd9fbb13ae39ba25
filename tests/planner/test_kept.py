"""Plans that are kept: whole, found again, and told apart by everything that they depend on."""

import dataclasses
import json

import pytest

from vlm_jax.planner import kept
from vlm_jax.planner.kept import kept_plan, plan_hash, plan_of
from vlm_jax.planner.request import Request


def test_a_kept_plan_is_the_plan(trained, tmp_path):
    for plan in trained.values():
        assert plan_of(json.loads(json.dumps(plan.to_json()))) == plan
    made = []

    def make():
        made.append(1)
        return trained["v5e:2x2"]

    first = kept_plan({"seed": 0}, make, str(tmp_path))
    again = kept_plan({"seed": 0}, make, str(tmp_path))
    assert first == (trained["v5e:2x2"], False) and again == (trained["v5e:2x2"], True) and len(made) == 1
    kept_plan({"seed": 1}, make, str(tmp_path))
    assert len(made) == 2 and not list(tmp_path.glob("*.part"))


def test_a_hash_depends_on_all_that_a_plan_depends_on(config, monkeypatch):
    request = Request(config, "v5e:2x2")
    others = [
        request.changed(topology="v5e:4x4"),
        request.changed(stage="decode"),
        request.changed(quick=True),
        request.changed(decoder__remat="dots"),
        dataclasses.replace(request, pictures=2),
    ]
    hashes = [plan_hash(one.asked()) for one in (request, *others)]
    assert len(set(hashes)) == len(hashes) and plan_hash(request.asked()) == hashes[0]
    monkeypatch.setattr(kept, "libtpu_version", lambda: "another")
    assert plan_hash(request.asked()) != hashes[0]


def test_an_unknown_key_is_named(config):
    with pytest.raises(ValueError, match=r"config\.decoder\.depht"):
        Request(config, "v5e:2x2").changed(decoder__depht=2)
