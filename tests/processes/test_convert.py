"""`python -m vlm_jax.cli.convert` as a process: both ways, its lines, a full disk, and error messages."""

import os
import subprocess
import sys

import pytest

from vlm_jax.checkpoints.hub import open_checkpoint

from .alphabet import LETTERS, write
from .conftest import ROOT, environment
from .test_full_disk import SMALL_DISK


def run(command, *arguments, prefix=()):
    """Exit status, standard output and standard error."""
    words = [*prefix, sys.executable, "-m", f"vlm_jax.cli.{command}", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert")
    (path / "released").mkdir()
    write(path / "released")
    return path


@pytest.fixture(scope="module")
def orbax(folder):
    status, out, errors = run("convert", f"--source={folder / 'released'}", f"--target={folder / 'orbax'}")
    assert status == 0 and errors == "", errors
    first, last = out.splitlines()
    assert first == f"Hugging Face -> Orbax: {folder / 'released'} -> {folder / 'orbax'}"
    # A table and a head of 29 x 30, four kernels of 30 x 30, three of 30 x 4, three norms of 30.
    assert last == "12 released tensors, 12 arrays of 5,790 parameters, 0 without a parameter, 23,160 bytes"
    return folder / "orbax"


def test_there_and_back(folder, orbax):
    status, out, errors = run("convert", f"--source={orbax}", f"--target={folder / 'back'}")
    assert status == 0 and errors == "", errors
    assert out.startswith(f"Orbax -> Hugging Face: {orbax} -> {folder / 'back'}\n")
    released = folder / "released"
    assert sorted(os.listdir(folder / "back")) == sorted(os.listdir(released))
    for name in os.listdir(released):
        if name != "model.safetensors":
            assert (folder / "back" / name).read_bytes() == (released / name).read_bytes()
    before, after = open_checkpoint(released), open_checkpoint(folder / "back")
    assert {key: x[...].tobytes() for key, x in before.items()} == {key: x[...].tobytes() for key, x in after.items()}


def test_a_home_folder_is_found(folder, orbax, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    status, _, errors = run("convert", "--source=~/orbax", "--target=~/home/back")
    assert status == 0 and errors == "", errors
    assert (folder / "home" / "back" / "model.safetensors").exists()


def test_the_arrays_answer(orbax):
    status, out, errors = run("generate", f"--checkpoint={orbax}", "--prompt=d")
    assert (status, out) == (0, LETTERS[4:] + "\n"), errors


@pytest.mark.parametrize("side", ["released", "orbax"])
def test_a_dry_run_lists_every_tensor_and_writes_nothing(folder, orbax, side):
    before = sorted(os.listdir(folder))
    status, out, errors = run("convert", f"--source={folder / side}", "--dry-run", f"--target={folder / 'none'}")
    assert status == 0 and errors == "", errors
    assert sorted(os.listdir(folder)) == before
    _, *ways, total = out.splitlines()
    assert total.startswith("12 released tensors")
    for key in open_checkpoint(folder / "released"):
        assert sum(f"{key} " in way for way in ways) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=none", "--target=x"], "CheckpointFileError: none: not a file or folder, and not the"),
        (["--source={folder}/released", "--target={folder}/orbax"], "orbax exists; pass another --target"),
        (["--source={folder}/released", "--target="], "--target: expected a folder to write; pass one, or --dry-run"),
        (["--source={folder}/released"], "--target: expected a folder to write; pass one, or --dry-run"),
        (["--source={folder}/released", "--target=x", "--dtype=float8"], "--dtype=float8: value should be one of"),
        (["--source={folder}", "--target=x"], "/config.json: no such file"),
    ],
)
def test_an_error_of_the_user_is_one_message(folder, orbax, arguments, message):
    status, out, errors = run("convert", *(argument.format(folder=folder) for argument in arguments))
    assert status == 1 and message in out + errors and "Traceback" not in errors, errors


@pytest.mark.parametrize("side", ["released", "orbax"])
def test_a_full_disk_is_explained_and_nothing_is_left(folder, orbax, side, tmp_path):
    (tmp_path / "disk").mkdir()
    listing = tmp_path / "listing"
    # The mount is gone with its process: what is on it is listed before.
    script = (
        f'mount -t tmpfs -o size=8k,nr_inodes=64 tmpfs "{tmp_path}/disk" && "$@"; status=$?; '
        f'find "{tmp_path}/disk" -mindepth 1 > "{listing}"; exit $status'
    )
    arguments = (f"--source={folder / side}", f"--target={tmp_path}/disk/out")
    status, _, errors = run("convert", *arguments, prefix=(*SMALL_DISK, script, "sh"))
    assert status == 1 and "Traceback" not in errors, errors
    assert "CheckpointFileError" in errors and "was removed" in errors and "space" in errors.lower(), errors
    assert listing.read_text() == ""


@pytest.mark.parametrize("side", ["released", "orbax"])
def test_a_write_that_is_refused_is_explained_and_nothing_is_left(folder, orbax, side, tmp_path):
    limit = ("sh", "-c", 'ulimit -f 8; exec "$@"', "sh")  # of a file, in blocks of 512 bytes
    status, _, errors = run("convert", f"--source={folder / side}", f"--target={tmp_path}/new/out", prefix=limit)
    assert status == 1 and "Traceback" not in errors, errors
    assert "CheckpointFileError" in errors and "could not be written, and was removed" in errors, errors
    assert not any(tmp_path.iterdir())
