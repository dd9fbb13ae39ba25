"""Checksums against MurmurHash3's finalizer in Python's integers."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.checkpoints import checksums
from vlm_jax.checkpoints.checksums import HostSum, array_checksums, check_files, list_files, sealed, unsealed
from vlm_jax.sharding.mesh import MeshSettings, make_mesh


def fmix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def reference(values: np.ndarray) -> str:
    content, width = values.tobytes(), min(values.dtype.itemsize, 4)
    words = [int.from_bytes(content[at : at + width], "little") for at in range(0, len(content), width)]
    total = sum(fmix32(word ^ (index * 0x9E3779B1 % 2**32)) for index, word in enumerate(words)) % 2**32
    return f"{values.dtype} {values.shape} {total:08x}"


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    found = {
        "f32": draw.normal(size=(8, 4, 3)).astype(np.float32),
        "u8": draw.integers(0, 256, (8, 5)).astype(np.uint8),
    }
    found |= {"bf16": draw.normal(size=(8, 4)).astype(ml_dtypes.bfloat16), "bool": draw.integers(0, 2, 8) == 1}
    return found | {"i32": draw.integers(-9, 9, (8, 2)).astype(np.int32), "scalar": np.asarray(7, np.int32)}


def test_checksums_of_the_host_equal_the_reference(arrays, monkeypatch):
    monkeypatch.setattr(checksums, "_BLOCK", 7)  # so that these arrays have several blocks
    given = {**arrays, "f64": np.linspace(0, 1, 9), "across": np.asfortranarray(arrays["f32"][:, :, 0])}
    assert array_checksums(given) == {name: reference(x) for name, x in given.items()}
    pieces = HostSum()
    for row in arrays["f32"]:
        pieces.add(row)
    assert f"{pieces.value:08x}" == reference(arrays["f32"]).split()[-1]


def test_checksums_of_devices_equal_the_reference_on_any_mesh(arrays, monkeypatch):
    monkeypatch.setattr(checksums, "_in_host_memory", lambda array: False)
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    specs = {"f32": ("fsdp", "tensor"), "u8": (("data", "fsdp", "tensor"),), "bf16": (None, "tensor"), "i32": ("data",)}
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs.get(name, ())))) for name, x in arrays.items()
    }
    assert array_checksums(placed) == {name: reference(x) for name, x in arrays.items()}


def test_flipped_signs_and_swapped_elements_change_the_checksum():
    values = np.zeros(64, np.float32)
    values[:32] = np.random.default_rng(0).normal(size=32)
    changed = [HostSum().add(values).value]
    for i in range(64):
        for j in range(i):
            signs, swapped = values.copy(), values.copy()
            signs[[i, j]] *= -1  # also of zeros
            swapped[[i, j]] = swapped[[j, i]]
            changed += [HostSum().add(signs).value] + ([HostSum().add(swapped).value] if i < 32 else [])
    assert len(changed) == 1 + 64 * 63 // 2 + 32 * 31 // 2 == len(set(changed))


def test_a_json_object_and_a_folder_are_compared(tmp_path):
    content = {"a": {"b": 1}, "c": [1.5, None]}
    assert unsealed(json.loads(json.dumps(sealed(content))), "p") == content
    for wrong in ({**sealed(content), "a": {"b": 2}}, content, [], None):
        with pytest.raises(ValueError, match=r"^p: expected (the checksum|a JSON object with a key crc32)"):
            unsealed(wrong, "p")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(b"123456789")
    list_files(tmp_path)
    assert json.loads((tmp_path / "files.json").read_text())["files"] == {
        "d/x": [9, "cbf43926"]
    }  # CRC-32's check value
    check_files(tmp_path)
    (tmp_path / "d" / "x").write_bytes(b"123456788")
    with pytest.raises(ValueError, match=r"d/x: expected the checksum cbf43926, found [0-9a-f]{8}$"):
        check_files(tmp_path)
