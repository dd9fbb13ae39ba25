"""Orbax checkpoints of tensors that are read one after the other."""

import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from vlm_jax.checkpoints.arrays import open_arrays, save_arrays
from vlm_jax.checkpoints.hub import CheckpointFileError, LazyTensor

from ..advice import tried

VALUES = {
    "blocks/kernel": np.random.default_rng(0).normal(size=(3, 4, 5)).astype(ml_dtypes.bfloat16),
    "blocks/experts": np.random.default_rng(1).normal(size=(3, 2, 4, 5)).astype(np.float16),
    "a.b": np.arange(2**40, 2**40 + 3),
    "scale": np.float64(1 / 3).reshape(()),
    "mask": np.array([[True, False]]),
}
STACKED = {"blocks/kernel": 1, "blocks/experts": 2, "a.b": 0, "scale": 0, "mask": 0}
SHAPES = {path: value.shape for path, value in VALUES.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "a folder"
    log = []

    def lazy(name, value):
        def read(index):
            log.append(name)
            return value[index]

        return LazyTensor(value.shape, value.dtype, read)

    save_arrays(path, {name: lazy(name, value) for name, value in VALUES.items()}, STACKED)
    assert sorted(log) == sorted(VALUES)  # each once
    return path


def test_bits_shapes_and_dtypes_come_back(directory):
    opened = open_arrays(directory, SHAPES)
    for path, value in VALUES.items():
        assert opened[path].dtype == value.dtype
        assert opened[path][...].tobytes() == value.tobytes()
    block = (slice(1, 2), slice(0, 4), slice(2, 5))
    np.testing.assert_array_equal(opened["blocks/kernel"][block], VALUES["blocks/kernel"][block])


def test_orbax_itself_reads_them(directory):
    restored = ocp.StandardCheckpointer().restore(directory)
    assert jax.tree.map(lambda x: x.dtype, restored)["blocks"]["kernel"] == ml_dtypes.bfloat16
    np.testing.assert_array_equal(restored["blocks"]["kernel"], VALUES["blocks/kernel"])
    np.testing.assert_array_equal(restored["a.b"], VALUES["a.b"])


def test_a_layer_is_a_chunk(directory):
    for name, chunk in (("blocks.kernel", (1, 4, 5)), ("blocks.experts", (1, 1, 4, 5))):
        base = {"driver": "file", "path": f"{directory}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        stored = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
        assert stored.chunk_layout.read_chunk.shape == chunk


def test_what_cannot_be_read_is_named(directory, tmp_path):
    with pytest.raises(CheckpointFileError, match=r"nowhere: not a complete Orbax checkpoint; write it again"):
        open_arrays(tmp_path / "nowhere", SHAPES)
    with pytest.raises(CheckpointFileError, match=r"of another model: it has mask \(1, 2\), not \(2, 1\)"):
        open_arrays(directory, {"mask": (2, 1)})
    with pytest.raises(CheckpointFileError, match=r"no.ne in .*a folder cannot be read"):
        open_arrays(directory, {"no/ne": ()})
    large = np.random.default_rng(0).normal(size=100_000)
    save_arrays(tmp_path / "out", {"x": LazyTensor(large.shape, large.dtype, lambda index: large[index])}, {"x": 0})
    opened = open_arrays(tmp_path / "out", {"x": large.shape})
    data = max((path for path in (tmp_path / "out").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CheckpointFileError, match=tried("{x} in {} cannot be read ({}); write it again")):
        opened["x"][...]
    shutil.rmtree(tmp_path / "out")
    save_arrays(tmp_path / "out", {"x": LazyTensor(large.shape, large.dtype, lambda index: large[index])}, {"x": 0})
    np.testing.assert_array_equal(open_arrays(tmp_path / "out", {"x": large.shape})["x"][...], large)


def test_a_tensor_that_cannot_be_read_stops_the_writing(tmp_path):
    def damaged(index):
        raise CheckpointFileError("no such bytes")

    with pytest.raises(CheckpointFileError, match="no such bytes"):
        save_arrays(tmp_path / "out", {"x": LazyTensor((2,), np.float32, damaged)}, {"x": 0})
    assert not (tmp_path / "out").exists()


def test_no_space_is_seen_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(OSError, match=r"no space left: .*out needs about .* bytes, 0 are free"):
        save_arrays(tmp_path / "out", {"x": LazyTensor((2,), np.float32, lambda index: None)}, {"x": 0})
    assert not list(tmp_path.iterdir())
