"""Checkpoint files and files of records: valid ones, changed, in a folder of the process."""

import functools
import io
import json
import os
import pathlib
import random
import struct
import tarfile
import tempfile
import zipfile
import zlib

import numpy as np
import safetensors.numpy

from tests.fuzz.mutation import NUMBERS, TEXTS, changed_bytes, changed_json, changed_text
from tests.fuzz.target import Target
from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint
from vlm_jax.config import ConfigError
from vlm_jax.data.conversations import Conversations, TooManyCorruptImages
from vlm_jax.data.source import Tools
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.processors.image import image_size, open_image

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b/c": np.ones((3,), np.int8),
    "scalar": np.asarray(2, np.float16),
}
SECRET = 1234567.0  # no changed byte of an int8 is it
PATHS = (
    "../outside.safetensors",
    "/etc/passwd",
    "./model-1.safetensors",
    "a/../model-1.safetensors",
    "",
    ".",
    "..",
    "model-1.safetensors\x00",
    "~/x.safetensors",
    "file:///x",
    "https://example.com/x",
    "m" * 5000,
    "pipe",
    "sub",
)


@functools.cache
def folder() -> pathlib.Path:
    """A folder with a shard, a named pipe and a folder, beside a file that nothing in it may show."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="vlm_jax_fuzz_"))
    inside = root / "inside"
    (inside / "sub").mkdir(parents=True)
    os.mkfifo(inside / "pipe")
    (root / "outside.safetensors").write_bytes(safetensors.numpy.save({"secret": np.full(3, SECRET)}))
    (inside / "model-1.safetensors").write_bytes(safetensors.numpy.save(ARRAYS))
    return inside


def _written(name: str, data: bytes) -> pathlib.Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def _read_tensors(path: pathlib.Path) -> None:
    checkpoint = open_checkpoint(path)
    for key, tensor in checkpoint.items():
        assert isinstance(key, str) and tensor.nbytes >= 0
        array = np.asarray(tensor)
        assert array.shape == tensor.shape and array.dtype == tensor.dtype
        assert SECRET not in array.astype(np.float64, copy=False).ravel()


def _safetensors(rng: random.Random) -> bytes:
    data = safetensors.numpy.save(ARRAYS)
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.5:
        return changed_bytes(rng, data)
    header = json.dumps(changed_json(rng, json.loads(data[8 : 8 + length]))).encode()
    if rng.random() < 0.3:
        header = changed_bytes(rng, header, 2)
    stated = len(header) if rng.random() < 0.9 else rng.choice((*NUMBERS, 2**63, 2**64 - 1))
    return struct.pack("<Q", stated) + header + changed_bytes(rng, data[8 + length :], 1)


def _npz(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(buffer, "w", rng.choice(methods)) as archive:
        for name, value in ARRAYS.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(value))
            data = member.getvalue()
            if rng.random() < 0.3:
                shapes = ("(True,)", "(2**40,)", "(99999999999,)", "(-1,)", "(3.0,)", "()", "(3, 0)", "[3]", "3", "'x'")
                head = f"{{'descr': {rng.choice(('|i1', '<f4', '|O', '|V2', '<U9', 'x'))!r}, 'fortran_order': False, "
                text = f"{head}'shape': {rng.choice(shapes)}, }}".encode().ljust(117) + b"\n"
                data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\x00" * 12
            for _ in range(1 + (rng.random() < 0.1)):
                try:
                    archive.writestr(
                        rng.choice((f"{name}.npy", name, "../x.npy", "é.npy")), changed_bytes(rng, data, 1)
                    )
                except UserWarning:
                    continue
    data = buffer.getvalue()
    return changed_bytes(rng, data) if rng.random() < 0.7 else data


def _index(rng: random.Random) -> bytes:
    names = [rng.choice(PATHS) if rng.random() < 0.4 else "model-1.safetensors" for _ in ARRAYS]
    keys = ("secret", *ARRAYS) if rng.random() < 0.2 else tuple(ARRAYS)
    index = {"metadata": {"total_size": 99}, "weight_map": dict(zip(keys, names, strict=False))}
    text = json.dumps(changed_json(rng, index) if rng.random() < 0.4 else index).encode()
    return changed_bytes(rng, text, 2) if rng.random() < 0.3 else text


def _record(rng: random.Random) -> object:
    records = (
        {"id": 1, "image": "a.png", "question": "what?", "answer": "a"},
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"image": "a.png", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"images": ["a.png"], "caption": "a"},
    )
    return changed_json(rng, rng.choice(records), 2)


def _records(rng: random.Random) -> bytes:
    given = [_record(rng) for _ in range(rng.randint(1, 4))]
    kind = rng.randrange(4)
    if kind == 0:
        data = json.dumps(given, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    elif kind == 1:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number, one in enumerate(given):
                for suffix, content in (("json", json.dumps(one).encode()), ("png", b"x"), ("txt", b"caption")):
                    info = tarfile.TarInfo(f"{rng.choice(('', '../', '/'))}{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        data = buffer.getvalue()
    else:
        data = "\n".join(changed_text(rng, json.dumps(one), TEXTS, 1) for one in given).encode("utf-8", "surrogatepass")
    return changed_bytes(rng, data, 2) if rng.random() < 0.5 else data


def _read_records(data: bytes) -> None:
    path = _written(f"records{zlib.crc32(data)}.jsonl", data)  # a new name, since opened files are kept
    try:
        settings = Conversations(None, str(path), num_images=None, max_corrupt=9)
        tools = Tools(lambda *_: "", open_image, image_size, lambda image: image, lambda *_, **__: (1, 1, 1))
        source = settings.open(tools)
        for sample in source.evaluation(0):
            assert sample.messages
    finally:
        path.unlink()


TARGETS = {
    "safetensors": Target(
        _safetensors, lambda data: _read_tensors(_written("model.safetensors", data)), (CheckpointFileError,)
    ),
    "npz": Target(_npz, lambda data: _read_tensors(_written("model.npz", data)), (CheckpointFileError,)),
    "index_files": Target(
        _index, lambda data: _read_tensors(_written("model.safetensors.index.json", data)), (CheckpointFileError,)
    ),
    "records": Target(_records, _read_records, (MalformedRecords, ConfigError, TooManyCorruptImages)),
}
