import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import LocalEntryNotFoundError

from vlm_jax.checkpoints import hub
from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint, read_config
from vlm_jax.checkpoints.saving import save_archive, save_checkpoint

from ..advice import tried

TENSORS = {
    "b.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "a.bias": np.arange(6).astype(ml_dtypes.bfloat16),
    "scale": np.asarray(2.5, np.float32),
    "ids": np.arange(5),
    "mask": np.array([True, False]),
    "half": np.arange(3, dtype=np.float16),
}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape and found[key].dtype == tensor.dtype
        read = np.asarray(found[key][...])
        assert read.dtype == tensor.dtype
        np.testing.assert_array_equal(read, tensor)


def sharded(folder):
    save_checkpoint(folder, TENSORS, max_shard_bytes=100)
    return json.loads((folder / hub.INDEX_FILE).read_text())


def test_one_file_round_trip(tmp_path):
    written = save_checkpoint(tmp_path / "new", TENSORS)
    assert [path.name for path in written] == ["model.safetensors"]
    assert_same(open_checkpoint(tmp_path / "new"), TENSORS)
    assert_same(open_checkpoint(str(written[0])), TENSORS)
    assert len(open_checkpoint(tmp_path / "new")) == len(TENSORS)


def test_shards_round_trip(tmp_path):
    index = sharded(tmp_path)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    names = sorted(set(index["weight_map"].values()))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, hub.INDEX_FILE]
    assert_same(open_checkpoint(tmp_path), TENSORS)
    assert_same(open_checkpoint(tmp_path / hub.INDEX_FILE), TENSORS)


def test_files_are_what_the_reference_library_reads_and_writes(tmp_path):
    (path,) = save_checkpoint(tmp_path, TENSORS)
    read = safetensors.numpy.load_file(path)
    for key, tensor in TENSORS.items():
        np.testing.assert_array_equal(read[key], tensor)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_slices_are_read_alone(tmp_path):
    save_checkpoint(tmp_path, TENSORS)
    weight = open_checkpoint(tmp_path)["b.weight"]
    np.testing.assert_array_equal(weight[1:3, 2:4], [[8, 9], [14, 15]])
    assert open_checkpoint(tmp_path)["scale"][()] == 2.5


def test_every_tensor_is_found_where_the_reference_library_put_it(tmp_path):
    """Of sizes and dtypes that do not follow the order of the names, an empty one among them."""
    tensors = {
        "a": np.arange(5, dtype=np.int8),
        "b": np.arange(12, dtype=np.float64).reshape(3, 4),
        "c": np.zeros((3, 0), np.float32),
        "d": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "e": np.array(7, np.int64),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"written": "by the library"})
    found = open_checkpoint(tmp_path)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(found[key][...], tensor, strict=True)
    np.testing.assert_array_equal(found["b"][2:3, 1:3], [[9, 10]])
    np.testing.assert_array_equal(found["b"][1:1, :], np.zeros((0, 4)))


def test_a_file_that_becomes_shorter_after_it_was_opened_is_named(tmp_path):
    (path,) = save_checkpoint(tmp_path, {"a": np.arange(6, dtype=np.float32)})
    tensor = open_checkpoint(tmp_path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointFileError, match=r"a of .*model.safetensors .* damaged or truncated"):
        _ = tensor[...]


def test_a_file_is_not_kept_in_memory_once_its_tensor_is_read(tmp_path):
    save_checkpoint(tmp_path, {"a": np.arange(6, dtype=np.float32)})
    (file,) = tmp_path.glob("*.safetensors")
    tensor = open_checkpoint(tmp_path)["a"]
    np.testing.assert_array_equal(tensor[...], np.arange(6, dtype=np.float32))
    with safetensors.safe_open(file, framework="numpy"):
        assert str(file) in Path("/proc/self/maps").read_text()  # where an open file shows
    assert str(file) not in Path("/proc/self/maps").read_text()


def test_views_are_written_in_their_own_order(tmp_path):
    save_checkpoint(tmp_path, {"w": TENSORS["b.weight"].T, "part": TENSORS["b.weight"][:, 1]})
    found = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(found["w"][...], TENSORS["b.weight"].T)
    np.testing.assert_array_equal(found["part"][...], [1, 7, 13, 19])


def test_npz_round_trip(tmp_path):
    path = tmp_path / "vit.npz"
    # NumPy stores bfloat16 as two bytes without a meaning.
    np.savez(path, **{f"params/{key}": tensor for key, tensor in TENSORS.items()})
    expected = {f"params/{key}": tensor for key, tensor in TENSORS.items()}
    assert_same(open_checkpoint(path), expected)
    assert_same(open_checkpoint(tmp_path), expected)
    np.testing.assert_array_equal(open_checkpoint(path)["params/b.weight"][1:2, :2], [[6, 7]])


def test_npz_with_fortran_order_and_a_long_header(tmp_path):
    array = np.asfortranarray(TENSORS["b.weight"])
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive, archive.open("w.npy", "w") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    np.testing.assert_array_equal(open_checkpoint(tmp_path)["w"][...], array)


def test_of_several_files_the_usual_name_is_taken(tmp_path):
    np.savez(tmp_path / "model.npz", x=np.zeros(1))
    np.savez(tmp_path / "cases.npz", y=np.zeros(1))
    assert set(open_checkpoint(tmp_path)) == {"x"}
    with pytest.raises(CheckpointFileError, match=r"model\.npz exists"):
        save_checkpoint(tmp_path, {"z": np.zeros(1)})
    safetensors.numpy.save_file({"z": np.zeros(1)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path)) == {"z"}
    with pytest.raises(CheckpointFileError, match=r"model\.safetensors exists"):
        save_archive(tmp_path, {"w": np.zeros(1)})


def test_an_ambiguous_folder_is_an_error(tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", x=np.zeros(1))
    with pytest.raises(CheckpointFileError, match=r"expected one checkpoint, found a.npz, b.npz"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointFileError, match=r"no model.safetensors, model.safetensors.index.json or .npz"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "model.pkl"])
def test_pickles_are_refused_with_a_way_out(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"w": 1}))
    for source in (path, tmp_path):
        with pytest.raises(CheckpointFileError, match=r"can run arbitrary code(.|\n)*safetensors\.torch\.save_file"):
            open_checkpoint(source)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.h5"
    path.write_bytes(b"")
    with pytest.raises(CheckpointFileError, match=r"model.h5: cannot be read as a checkpoint; expected .safe"):
        open_checkpoint(path)


def test_a_pickled_array_in_an_npz_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, good=np.zeros(2), bad=np.array([1, 2.5], dtype=object))
    told = tried(
        "{bad} is a pickled array, which is not read, because opening one can run arbitrary code. Convert it once"
    )
    with pytest.raises(CheckpointFileError, match=told):
        open_checkpoint(path)
    arrays = dict(np.load(path, allow_pickle=True))
    arrays["bad"] = arrays["bad"].astype(np.float32)
    np.savez(tmp_path / "new.npz", **arrays)
    assert open_checkpoint(tmp_path / "new.npz")["bad"][...].dtype == np.float32


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_safetensors_file_cut_short_is_named(tmp_path, length):
    (path,) = save_checkpoint(tmp_path, TENSORS)
    content = path.read_bytes()[:length]
    path.write_bytes(content)
    told = tried("bytes): damaged or truncated ({}); download it again")
    with pytest.raises(CheckpointFileError, match=rf"model.safetensors \({len(content)} {told}"):
        open_checkpoint(tmp_path)
    path.unlink()
    save_checkpoint(tmp_path, TENSORS)  # as downloaded again
    assert open_checkpoint(tmp_path).keys() == TENSORS.keys()


@pytest.mark.parametrize("length", [0, 100, -1])
def test_an_npz_file_cut_short_is_named(tmp_path, length):
    path = tmp_path / "model.npz"
    np.savez(path, **{key: TENSORS[key] for key in ("ids", "b.weight")})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointFileError, match=r"model.npz \(\d+ bytes\): damaged or truncated"):
        open_checkpoint(path)


def test_an_npz_member_that_is_no_array_is_named(tmp_path):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", b"not an array at all")
    with pytest.raises(CheckpointFileError, match=r"model.npz .* damaged"):
        open_checkpoint(path)


def written_npz(path, header, data=b"\x00" * 12, method=zipfile.ZIP_STORED, names=("w.npy",)):
    """An archive of one array in the format of NumPy, whatever its header says."""
    text = header.encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same name twice
        for name in names:
            archive.writestr(name, content)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_may_be_compressed_in_any_way_that_python_reads(tmp_path, method):
    written_npz(tmp_path / "model.npz", HEADER % "(3,)", method=method)
    np.testing.assert_array_equal(open_checkpoint(tmp_path)["w"][...], np.zeros(3, np.float32))


@pytest.mark.parametrize(
    "shape",
    ["(True, 3)", "(99999999999,)", "(2**40,)", "(-3,)", "(3.0,)", "(2, 3)", "()", "3", "[3]", "('3',)", "(" * 60],
)
def test_an_npz_whose_shape_is_not_that_of_its_bytes_is_refused_before_it_is_read(tmp_path, shape):
    written_npz(tmp_path / "model.npz", HEADER % shape)
    told = tried("{w} has the shape {} of {} in its header, but {12} bytes; write the file again")
    with pytest.raises(CheckpointFileError, match=rf"model.npz(: {told}| \(\d+ bytes\): damaged)"):
        open_checkpoint(tmp_path)
    written_npz(tmp_path / "model.npz", HEADER % "(3,)")
    assert open_checkpoint(tmp_path)["w"].shape == (3,)


@pytest.mark.parametrize("names", [("w.npy", "w.npy"), ("w.npy", "w")])
def test_an_npz_with_an_array_twice_is_refused(tmp_path, names):
    written_npz(tmp_path / "model.npz", HEADER % "(3,)", names=names)
    with pytest.raises(CheckpointFileError, match=tried("has {w} twice; write it again with one array of each name")):
        open_checkpoint(tmp_path)
    written_npz(tmp_path / "model.npz", HEADER % "(3,)")
    assert list(open_checkpoint(tmp_path)) == ["w"]


@pytest.mark.parametrize("place", [8, 10], ids=["encrypted", "method"])
def test_an_npz_that_python_cannot_read_is_named(tmp_path, place):
    path = tmp_path / "model.npz"
    written_npz(path, HEADER % "(3,)")
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")  # the directory, in which the flags are at 8 and the compression at 10
    content[start + place] = 1 if place == 8 else 97
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointFileError, match=r"model.npz \(\d+ bytes\): damaged"):
        open_checkpoint(path)


def test_a_flipped_bit_in_an_npz_is_found_on_reading(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, w=np.zeros(1000, np.float32))
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointFileError, match=r"w.npy of .*model.npz .* damaged"):
        open_checkpoint(path)["w"][...]


def test_the_pointer_of_git_lfs_is_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointFileError, match=tried("instead of the file; fetch it with `git lfs pull`")):
        open_checkpoint(path)
    path.unlink()
    save_checkpoint(tmp_path, TENSORS)  # as pulled
    assert open_checkpoint(path).keys() == TENSORS.keys()


def test_one_of_several_checkpoints_is_chosen_by_its_path(tmp_path):
    for name in ("one", "two"):
        safetensors.numpy.save_file({name: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointFileError, match=tried("found {one.safetensors, two.safetensors}; pass the path of the file")
    ):
        open_checkpoint(tmp_path)
    assert list(open_checkpoint(tmp_path / "two.safetensors")) == ["two"]
    index = {"weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}
    (tmp_path / hub.INDEX_FILE).write_text(json.dumps(index))
    assert sorted(open_checkpoint(tmp_path / hub.INDEX_FILE)) == ["one", "two"]


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointFileError, match=r"w has dtype F8_E4M3; expected one of F64"):
        open_checkpoint(path)


def test_every_disagreement_of_index_and_shards_is_listed(tmp_path):
    index = sharded(tmp_path)
    first = "model-00001-of-00002.safetensors"
    held = sorted(key for key, name in index["weight_map"].items() if name == first)
    del index["weight_map"][held[0]]
    index["weight_map"] |= {"new": first, "lost": "model-00003.safetensors", "far": "../model.safetensors"}
    (tmp_path / hub.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert f"new is not in {first}" in message
    assert f"{held[0]} is in {first} but not in the index" in message
    assert "the shard model-00003.safetensors is missing (1 tensors)" in message
    assert "../model.safetensors is not a file name next to the index" in message
    assert re.search(tried("{} and its shards disagree; download them again:\n  "), message)
    (tmp_path / "again").mkdir()
    sharded(tmp_path / "again")
    assert held[0] in open_checkpoint(tmp_path / "again")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_an_error(tmp_path, content):
    (tmp_path / hub.INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointFileError, match="weight_map"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[1]", "JSON object, got list")])
def test_a_config_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointFileError, match=rf"config.json: .*{message}"):
        read_config(tmp_path)


def test_config(tmp_path):
    with pytest.raises(CheckpointFileError, match=r"config.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "vision.json").write_text('{"hidden_size": 4}')
    assert read_config(tmp_path, name="vision.json") == {"hidden_size": 4}


def test_a_checkpoint_is_not_overwritten(tmp_path):
    save_checkpoint(tmp_path, {"w": np.zeros(1)})
    with pytest.raises(CheckpointFileError, match=r"model.safetensors exists"):
        save_checkpoint(tmp_path, TENSORS, max_shard_bytes=100)
    assert set(open_checkpoint(tmp_path)) == {"w"}
    sharded(tmp_path / "shards")
    with pytest.raises(CheckpointFileError, match=r"index.json exists"):
        save_checkpoint(tmp_path / "shards", TENSORS)


def test_dtypes_that_safetensors_lacks_are_listed_and_nothing_is_written(tmp_path):
    tensors = {"text": np.array(["a"]), "object": np.array([None]), "good": np.zeros(1)}
    with pytest.raises(CheckpointFileError, match=r"text \(<U1\), object \(object\)"):
        save_checkpoint(tmp_path / "new", tensors)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fails_at", ["write", "rename"])
def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch, fails_at):
    calls = []

    def failing(real):
        def call(*args, **settings):
            calls.append(args)
            if len(calls) == 2:
                raise OSError("no space left on device")
            return real(*args, **settings)

        return call

    if fails_at == "write":
        monkeypatch.setattr(safetensors.numpy, "save_file", failing(safetensors.numpy.save_file))
    else:
        monkeypatch.setattr(hub.os, "replace", failing(hub.os.replace))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, TENSORS, max_shard_bytes=100)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    tensors = {key: np.zeros(size, np.uint8) for key, size in (("a", 4), ("b", 100), ("c", 4), ("d", 5))}
    save_checkpoint(tmp_path, tensors, max_shard_bytes=9)
    weight_map = json.loads((tmp_path / hub.INDEX_FILE).read_text())["weight_map"]
    assert [weight_map[key][6:11] for key in "abcd"] == ["00001", "00002", "00003", "00003"]


@pytest.mark.parametrize("name", ["missing", "a/b/c", "/no/such/folder", "./x", "../x"])
def test_what_is_neither_a_path_nor_a_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointFileError, match="not a file or folder, and not the `organisation/name`"):
        open_checkpoint(name)


def test_without_a_connection_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointFileError, match=r"could not be downloaded from the Hugging Face hub(.|\n)*path"):
        open_checkpoint("nobody/nothing")


def test_a_repository_is_downloaded_and_opened(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, TENSORS)
    asked = {}

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, allow_patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(open_checkpoint("google/siglip", revision="main"), TENSORS)
    assert asked["repo_id"] == "google/siglip" and asked["revision"] == "main"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])


def test_errors_of_the_hub_keep_their_reason(monkeypatch):
    def snapshot_download(*args, **settings):
        raise LocalEntryNotFoundError("no internet")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointFileError, match="LocalEntryNotFoundError: no internet"):
        open_checkpoint("google/siglip")


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path):
    """As in a cache of the hub whose blob was deleted."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointFileError, match=r"model\.safetensors: a link to a file that does not exist"):
        open_checkpoint(tmp_path)


def test_a_repository_is_given_by_its_folder_where_there_is_no_connection(tmp_path):
    told = tried("Without a connection, download the repository elsewhere and pass the path of its folder")
    with pytest.raises(CheckpointFileError, match=told):
        hub.fetch("organisation/none")
    save_checkpoint(tmp_path, TENSORS)
    assert open_checkpoint(hub.fetch(tmp_path)).keys() == TENSORS.keys()


def test_a_dtype_that_safetensors_lacks_is_cast(tmp_path):
    values = np.array([1 + 0j, 2])
    with pytest.raises(
        CheckpointFileError, match=tried("safetensors does not support {w (complex128)}; cast to a numeric")
    ):
        save_checkpoint(tmp_path, {"w": values})
    save_checkpoint(tmp_path, {"w": values.real.astype(np.float32)})
    assert open_checkpoint(tmp_path)["w"][...].tolist() == [1.0, 2.0]
