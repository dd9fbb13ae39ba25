"""Files of the newest checkpoint deleted, truncated, or with one bit flipped: what is damaged is never loaded."""

import contextlib
import gc
import json
import pathlib
import random
import re

import jax
import numpy as np
import pytest

from tests.faults.training import STEPS, trainer
from vlm_jax.checkpoints import runs
from vlm_jax.checkpoints.checksums import sealed
from vlm_jax.checkpoints.orbax import RunCheckpoints
from vlm_jax.checkpoints.verification import CheckpointError, DamagedCheckpoint
from vlm_jax.leaves import flatten
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import placed

from ..advice import tried

# TensorStore's reads that end after another one failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """What reads that end leave behind is collected here, where the mark ignores it, not at the end of the session."""
    yield
    gc.collect()


# Files of a checkpoint that have neither arrays nor the position, but times; what is loaded without them is the same.
STAMPS = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Run:
    """A trained run, whose checkpoints are read again and again."""

    def __init__(self, workdir, trainer):
        self.workdir, self.newest = workdir, workdir / "checkpoints" / str(STEPS)
        self.like = trainer._abstract_state(trainer._spans[0])
        self.files = sorted(path for path in self.newest.rglob("*") if path.is_file())
        self.states = {step: self.read(step) for step in (STEPS, STEPS - 1)}

    def resumed(self):
        checkpoints = RunCheckpoints(self.workdir / "checkpoints", 2)
        with contextlib.closing(checkpoints):
            return checkpoints.newest(lambda step: self.like)

    def read(self, step):
        checkpoints = RunCheckpoints(self.workdir / "checkpoints", 2)
        with contextlib.closing(checkpoints):
            return checkpoints.restore(step, self.like)

    @contextlib.contextmanager
    def damaged(self, path: pathlib.Path, content: bytes | None):
        """The run with other bytes in one file of its newest checkpoint, or without the file."""
        before = path.read_bytes()
        try:
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            yield
        finally:
            aside = self.newest.with_name(f"{STEPS}.damaged")
            if aside.exists():
                aside.rename(self.newest)
            path.write_bytes(before)


@pytest.fixture(scope="module")
def run(trained):
    return Run(*trained)


def same(a, b) -> bool:
    """Bit for bit, for NaN too."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed, bit = bytearray(content), draw.randrange(8 * len(content))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_the_checkpoint_has_the_files_that_are_damaged_here(run):
    names = {re.sub(r"d/[0-9a-f]{32}$", "d/*", str(path.relative_to(run.newest))) for path in run.files}
    assert {"position/metadata", "state/_METADATA", "state/files.json", "state/manifest.ocdbt", "state/d/*"} <= names
    assert max(path.stat().st_size for path in run.files) > 20_000  # most are small
    assert run.resumed().step == STEPS and not same(run.states[STEPS], run.states[STEPS - 1])


def test_a_damaged_file_is_named_and_the_checkpoint_before_is_read(run, request, caplog):
    draw = random.Random(0)
    for path in run.files:
        content = path.read_bytes()
        changes = [None, content[: len(content) // 2], content[:-1], b""]
        changes += [flipped(content, draw) for _ in range(request.config.getoption("--flips"))]
        for changed in changes:
            caplog.clear()
            with run.damaged(path, changed):
                found = run.resumed()
            case = f"{path.relative_to(run.newest)}: {changed if changed is None else len(changed)} of {len(content)}"
            if found.step == STEPS:
                assert path.name in STAMPS and same(found[1:], run.states[STEPS]), case
                continue
            assert same(found[1:], run.states[STEPS - 1]), case
            (told,) = [one.getMessage() for one in caplog.records if one.name.startswith("vlm_jax")]
            assert f"{path}: " in told, case
            assert f"resumes from checkpoint {STEPS - 1}; {run.newest} is kept as {STEPS}.damaged" in told, case


def data_files(run) -> list[pathlib.Path]:
    """The files that hold values; those that a newer one replaced are among them."""
    return [path for path in run.files if path.parent.name == "d"]


@contextlib.contextmanager
def without_checksums_of_files(run):
    """The run as if all its data files were large, so that only the checksums of arrays tell."""
    path = run.newest / "state" / "files.json"
    listed = json.loads(path.read_text())["files"]
    files = {name: [size, None if "d/" in name else crc] for name, (size, crc) in listed.items()}
    with run.damaged(path, json.dumps(sealed({"files": files})).encode()):
        yield


def test_flipped_values_are_found_by_the_checksums_of_arrays(run, request):
    """Some bits of a file are not part of any value."""
    draw, number = random.Random(1), 20 * request.config.getoption("--flips")
    files = data_files(run)
    sizes = [path.stat().st_size for path in files]
    outcomes = []
    with without_checksums_of_files(run):
        for path in draw.choices(files, sizes, k=number):
            with run.damaged(path, flipped(path.read_bytes(), draw)):
                try:
                    found = run.read(STEPS)
                except DamagedCheckpoint as error:  # no other error, by which a run would end
                    outcomes.append("expected float32 (" in str(error))
                    continue
                assert same(found, run.states[STEPS]), path
    assert sum(outcomes) > number // 3  # others break the compression, or the tree of keys


def test_readers_of_single_parts_refuse_a_damaged_checkpoint(run, trained):
    """They are asked for one checkpoint, so they read no older one in its place."""
    workdir, trainer = trained
    shapes = placed(trainer.experiment.boxed_shapes(), trainer.mesh)
    parts = {"decoder": shapes["decoder"]}
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(parts)}
    name = max(wanted, key=lambda path: np.prod(wanted[path]))
    expected = runs.read_parts(workdir / "checkpoints", parts)
    np.testing.assert_array_equal(
        runs.open_run(workdir / "checkpoints", wanted)[name][...], dict(flatten(expected))[name]
    )
    path = max(data_files(run), key=lambda path: path.stat().st_size)
    told = tried("Rename the folder to {12}.damaged to read the checkpoint before it, if there is one")
    with run.damaged(path, path.read_bytes()[:-1]):
        for read in (runs.read_parts, runs.open_run):
            with pytest.raises(CheckpointError, match=f"{path}: expected [0-9,]+ bytes, found [0-9,]+. {told}"):
                read(workdir / "checkpoints", parts if read is runs.read_parts else wanted)
        run.newest.rename(run.newest.with_name(f"{STEPS}.damaged"))
        runs.read_parts(workdir / "checkpoints", parts)
    # Values that no file's checksum covers.
    described = run.newest / "position" / "metadata"
    content = {key: value for key, value in json.loads(described.read_text()).items() if key != "crc32"}
    kept = content["arrays"][f"params/{name}"]
    content["arrays"][f"params/{name}"] = f"{kept[:-8]}{int(kept[-8:], 16) ^ 1:08x}"
    with run.damaged(described, json.dumps(sealed(content)).encode()):
        with pytest.raises(CheckpointError, match=f"params/{name}: expected .*, found "):
            runs.read_parts(workdir / "checkpoints", parts)
        opened = runs.open_run(workdir / "checkpoints", wanted)
        with pytest.raises(CheckpointError, match=f"params/{name}: expected .*, found "):
            opened[name][...]
        others = [path for path in wanted if path != name]
        np.testing.assert_array_equal(opened[others[0]][...], dict(flatten(expected))[others[0]])


def test_a_checkpoint_is_verified_on_another_mesh(run, trained, tmp_path):
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    other = trainer(tmp_path / "other", mesh)
    checkpoints = RunCheckpoints(trained[0] / "checkpoints", 2)
    with contextlib.closing(checkpoints):
        found = checkpoints.newest(lambda step: other._abstract_state(other._spans[0]))
    assert found.step == STEPS and same(found[1:], run.states[STEPS])
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(found.state))


def test_checkpoints_of_an_earlier_version_are_read_and_named(run, caplog):
    """They have a position without checksums, and no list of files."""
    listed, position = run.newest / "state" / "files.json", run.newest / "position" / "metadata"
    with run.damaged(listed, None), run.damaged(position, json.dumps({"batch": STEPS}).encode()):
        found = run.resumed()
    assert found.step == STEPS and same(found[1:], run.states[STEPS])
    assert "is of an earlier version, without checksums: what is read is not verified" in caplog.text
