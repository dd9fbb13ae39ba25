"""Plans that are kept: whole, found again, and told apart by everything that they depend on."""

import dataclasses
import importlib
import json
import pathlib

import pytest

import vlm_jax
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
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "--xla_some_flag=1")
            hashes.append(plan_hash(request.asked()))
    monkeypatch.setattr(kept, "libtpu_version", lambda: "another")
    hashes.append(plan_hash(request.asked()))
    assert len(set(hashes)) == len(hashes)


def test_a_hash_depends_on_the_settings_of_a_released_folder(config, tmp_path):
    request, hashes = Request(config, "v5e:2x2").changed(release=str(tmp_path)), []
    for text in ("{}", '{"size": 1}'):
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_text(text)
            hashes.append(plan_hash(request.asked()))
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert len(set(hashes)) == 4 and plan_hash(request.asked()) == hashes[-1]


def test_a_hash_depends_on_released_configs_and_plugins(tmp_path, monkeypatch):
    """Files of `vlm_jax` and of packages that register kinds, as their metadata says."""
    module, package = tmp_path / "one_module.py", tmp_path / "package"
    package.mkdir()
    (tmp_path / "of_it.dist-info").mkdir()
    (tmp_path / "of_it.dist-info" / "METADATA").write_text("Name: of_it\nVersion: 1\n")
    points = "[vlm_jax.plugins]\none = one_module:register\ntwo = package.inner:register\n"
    (tmp_path / "of_it.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for path in (module, package / "__init__.py", package / "table.json", package / "read.txt"):
        path.write_text("1")
        importlib.invalidate_caches()
        hashes.append(plan_hash({}))
    assert len(set(hashes)) == 3 and hashes[3] == hashes[2]
    released = pathlib.Path(str(vlm_jax.__file__)).parent / "pretrained" / "released" / "llava-hf--llava-1.5-7b-hf"
    assert released / "preprocessor_config.json" in kept._files("vlm_jax").values()


def test_an_unknown_key_is_named(config):
    with pytest.raises(ValueError, match=r"config\.decoder\.depht"):
        Request(config, "v5e:2x2").changed(decoder__depht=2)
