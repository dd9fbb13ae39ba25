"""The template of a package with kinds of its own: installed, tested by its own tests, and used by commands by name."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from .conftest import CONFIG, ROOT, environment

TEMPLATE = ROOT / "templates" / "plugin_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(a copy of the template, the folder into which it is installed), without a network."""
    copy, site = tmp_path_factory.mktemp("package") / "plugin_package", tmp_path_factory.mktemp("site")
    shutil.copytree(TEMPLATE, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", f"--target={site}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(copy)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return copy, site


def run(site, folder, *words, devices=1):
    """(exit status, standard output, standard error) of Python with the installed package."""
    env = {**environment(devices), "PYTHONPATH": f"{site}:{ROOT}"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_its_own_tests_and_the_contracts_pass(installed):
    copy, site = installed
    status, out, errors = run(site, copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", devices=8)
    assert status == 0, out[-5000:] + errors[-2000:]
    for name in (
        "test_sharded_equals_unsharded[middle] PASSED",
        "test_what_is_left_stands_in_order[central] PASSED",
        "test_a_folder_is_loaded_and_written_back_bit_for_bit[plain_vit] PASSED",
        "test_features_near_the_centre_are_kept[4-expected0] PASSED",
    ):
        assert name in out, name
    assert "skipped" not in out and "[pool]" not in out


def test_commands_know_its_kinds(installed, tmp_path):
    """A run of a few steps by config keys alone."""
    _, site = installed
    keys = [
        "connector.kind=middle",
        "reducer.kind=central",
        "token_budget=2",
        "stages.answering.steps=2",
        "stages.answering.warmup_steps=1",
    ]
    words = ["-m", "vlm_jax.cli.train", f"--config={CONFIG}", f"--workdir={tmp_path}", "--compilation_cache="]
    status, _, errors = run(site, ROOT, *words, *(f"--config.{key}" for key in keys))
    assert status == 0, errors
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_folder_of_its_family_is_loaded(installed, tmp_path):
    """Parameters are the tensors of the file, stacked and transposed; only the lookup imports the package."""
    _, site = installed
    rng = np.random.default_rng(0)
    shapes = {"positions": (4, 8), "patches.weight": (8, 3, 4, 4), "patches.bias": (8,)}
    layers = {"query": (8, 8), "key": (8, 8), "value": (8, 8), "out": (8, 8), "fc1": (32, 8), "fc2": (8, 32)}
    for name, shape in layers.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    for name in ("norm", "blocks.0.norm1", "blocks.0.norm2"):
        shapes |= {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder = tmp_path / "release"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    sizes = {"width": 8, "depth": 1, "num_heads": 2, "image_size": 8, "patch_size": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "plain_vit", **sizes}))
    code = (
        "import sys, numpy, vlm_jax, vlm_jax.cli.sweep; assert 'vlm_jax_example' not in sys.modules;"
        "layers = vlm_jax.from_pretrained(sys.argv[1]).params['blocks']['layers'];"
        "numpy.save(sys.argv[2], layers['mlp']['up']['kernel'])"
    )
    status, _, errors = run(site, tmp_path, "-c", code, str(folder), str(tmp_path / "kernel.npy"))
    assert status == 0, errors
    np.testing.assert_array_equal(np.load(tmp_path / "kernel.npy")[0], tensors["blocks.0.fc1.weight"].T)
