"""Files of every format: where their records are, what they hold, and how a damaged one is named."""

import base64
import dataclasses
import gzip
import io
import json
import pickle
import random
import sys
import tarfile

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from vlm_jax.config import ConfigError
from vlm_jax.data import media, text_offsets
from vlm_jax.data.record_files import Rules, open_records
from vlm_jax.data.stores import MalformedRecords, open_store
from vlm_jax.processors.image import open_image
from vlm_jax.types import images_of, text_of

RULES = Rules(("vqa",))


def values(path):
    store = open_store(str(path), "train_path")
    return [store.fields(index) for index in range(len(store))]


def picture(value):
    """A PNG file of one grey level."""
    data = io.BytesIO()
    Image.new("L", (3, 2), value).save(data, "PNG")
    return data.getvalue()


def shades(record):
    """The grey level of every picture of a record."""
    return [int(open_image(media.content(image), channels=1).max()) for image in record.images]


def said(value, **fields):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "a"}]
    return {"conversations": turns, **fields}


def drawn(draw, depth=0):
    """A random JSON value, of texts that look like structure."""
    kind = draw.randrange(7)
    if kind == 0 or depth > 3:
        return draw.choice(['a"b', "\\", '\\\\"', "[{", '}],"', "é\n", "", '\\"\\\\\\', 7, None])
    if kind < 4:
        return [drawn(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(drawn(draw, 9)): drawn(draw, depth + 1) for _ in range(draw.randrange(4))}


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 22])
def test_elements_and_lines_are_those_of_the_json_module_for_any_size_of_chunk(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(text_offsets, "CHUNK", chunk)
    draw, path = random.Random(chunk), tmp_path / "set"
    for _ in range(60):
        given = [drawn(draw) for _ in range(draw.randrange(1, 8))]
        array = json.dumps(given, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        path.write_text(draw.choice(["", "\n "]) + array + draw.choice(["", "\n "]))
        assert values(path) == given
        path.write_text("[ ]")
        assert values(path) == []
        lines = [json.dumps([value])[1:-1] if draw.random() < 0.8 else draw.choice(["", " ", "\t "]) for value in given]
        path.write_text("{}\n" + "\n".join(lines) + draw.choice(["", "\n"]), newline="")
        store = open_store(str(path), "train_path")
        assert [store.fields(index) for index in range(1, len(store))] == [
            json.loads(line) for line in lines if line.strip()
        ]
        numbers = [1, *(number for number, line in enumerate(lines, start=2) if line.strip())]
        assert [store.place(index) for index in range(len(store))] == [f"{path}:{number}" for number in numbers]


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
@pytest.mark.parametrize("array", [True, False])
def test_text_is_read_by_its_content_with_crlf_a_byte_order_mark_and_gzip(name, array, tmp_path):
    given = [said("é", id=number) for number in range(3)]
    plain = json.dumps(given, indent=1) if array else "\n".join(map(json.dumps, given)) + "\n"
    for text in (plain, plain.replace("\n", "\r\n"), "\ufeff" + plain):
        (tmp_path / name).write_text(text, newline="", encoding="utf-8")
        assert values(tmp_path / name) == given
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert values(tmp_path / f"{name}.gz") == given


def test_offsets_are_kept_not_objects(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text((json.dumps(said("q" * 100)) + "\n") * 5000)
    store = open_store(str(path), "train_path")
    assert len(pickle.dumps(store)) < 5000 * 16 + 2000  # two numbers a line
    again = pickle.loads(pickle.dumps(store))
    assert again.fields(4999) == store.fields(4999) == said("q" * 100)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.mark.parametrize("compressed", [False, True])
def test_members_of_one_base_name_are_a_record(compressed, tmp_path):
    members = {
        "a/000.jpg": picture(10),
        "a/000.json": json.dumps(said("<image>\nq", image="elsewhere.jpg", id="first")).encode(),
        "a/001.0.png": picture(20),
        "a/001.1.PNG": picture(30),
        "a/001.json": json.dumps(said("one <image> two <image>", width=4)).encode(),
        "a/002.json": json.dumps(said("no picture")).encode(),
        "a/003.png": picture(40),
        "a/003.txt": b"a page\n",
        "a/003.cls": b"7",
    }
    members[f"a/{'x' * 120}.png"] = picture(50)
    members[f"a/{'x' * 120}.txt"] = b"a long name"
    path = tmp_path / "set.tar"
    write_tar(path, members)
    if compressed:
        path = tmp_path / "set.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "set.tar").read_bytes()))
    records = open_records(str(path), RULES, "train_path")
    assert [record.record_id for record in records] == ["first", "a/001", "a/002", "a/003", f"a/{'x' * 120}"]
    again = list(pickle.loads(pickle.dumps(records)))
    assert [shades(record) for record in again] == [[10], [20, 30], [], [40], [50]]
    assert [len(images_of(record.messages[0])) for record in records] == [1, 2, 0, 1, 1]
    assert [text_of(record.messages[-1]) for record in records] == ["a", "a", "a", "a page", "a long name"]


def test_array_records_hold_json(tmp_path):
    encoded = base64.b64encode(picture(60)).decode()
    path = tmp_path / "set.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for number in range(3):
        images = [f"data:image/png;base64,{encoded}"] * number
        writer.write(json.dumps(said("q", id=number, images=images)).encode())
    writer.close()
    records = pickle.loads(pickle.dumps(open_records(str(path), RULES, "train_path")))
    assert [record.record_id for record in records] == ["0", "1", "2"]
    assert [shades(record) for record in records] == [[], [60], [60, 60]]
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"\x0a\x05image")
    writer.close()
    with pytest.raises(
        MalformedRecords, match=r"set\.array_record\[0\]: expected JSON, as of a line of JSONL: not JSON"
    ):
        open_records(str(path), RULES, "train_path")


def test_a_pattern_stands_for_its_files_in_order(tmp_path):
    for number, count in ((1, 2), (0, 3)):
        lines = [json.dumps(said("q", id=f"{number}.{index}", image="a.png")) for index in range(count)]
        (tmp_path / f"part-{number}.jsonl").write_text("\n".join(lines))
    records = open_records(f"{tmp_path}/part-*.jsonl", RULES, "train_path")
    assert [record.record_id for record in records] == ["0.0", "0.1", "0.2", "1.0", "1.1"]
    assert records[3].images == (f"{tmp_path}/a.png",)
    (tmp_path / "part-1.jsonl").write_text(json.dumps(said("<image>q")))
    with pytest.raises(MalformedRecords, match=r"part-1\.jsonl:1: .* 1 placeholders <image>, but 0 images"):
        open_records(f"{tmp_path}/part-*.jsonl", RULES, "train_path")


def tar_bytes():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        header = tarfile.TarInfo("a.txt")
        header.size = 3000
        tar.addfile(header, io.BytesIO(b"x" * 3000))
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps(said("q"), indent=1).encode(),
            r"set:1: not JSON: .* goes on over several lines: write one object a",
        ),
        (json.dumps(said("q")).encode() * 2, r"set:1: not JSON: .*several objects are on the line: write one a line"),
        (b"question,answer\nwhat,that\n", r"set:1: not JSON: .*; expected a JSON array, JSONL, parquet, a WebDataset"),
        (
            json.dumps(said("q")).encode() + b'\n{"id": "\xe9"}',
            r"set:2: expected UTF-8 text, got the byte 0xe9 .*iconv",
        ),
        (b'[{"a": 1}\n,\n{"a": "b]', r"set:3: not a JSON array: Unterminated string"),
        (b'[{"a": 1},\n{"a": 2}}\n]', r"set:2: not a JSON array: Extra data"),
        (b'[{"a": 1},\n{"a": 2}]\n]', r"set:3: not a JSON array: text follows the end of the array; write one array"),
        (b'[{"a": 1},\n\n{"a" 2}]', r"set\[1\]: \(line 3\) not JSON: Expecting ':' delimiter"),
        (tar_bytes()[:2000], r"set: a tar that is cut off or damaged: .*; write it again"),
        (bytes.fromhex("83af70d10d884a3f") + b"\x00" * 99, r"set: an ArrayRecord file that is cut off or damaged"),
        (gzip.compress(b"[]" * 99, mtime=0)[:-9], r"set: expected UTF-8 text, plain or compressed by gzip"),
        (picture(1), r"set: this is a PNG image; expected a JSON array, JSONL"),
        (bytes(100), r"set:1: expected UTF-8 text, got UTF-16 without a byte order mark, or no text"),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_line_and_the_fix(content, message, tmp_path):
    (tmp_path / "set").write_bytes(content)
    with pytest.raises(MalformedRecords, match=message):
        open_records(str(tmp_path / "set"), RULES, "train_path")


def test_the_home_folder_stands_for_itself_in_paths_and_patterns(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set.jsonl").write_text(
        json.dumps(said("q", image="~/a.png")) + "\n" + json.dumps(said("q", image="b.png"))
    )
    for path in ("~/set.jsonl", "~/*.jsonl"):
        records = open_records(path, RULES, "train_path")
        assert [record.images for record in records] == [(f"{tmp_path}/a.png",), (f"{tmp_path}/b.png",)]


def test_a_folder_and_a_pattern_without_files_are_refused_by_their_key(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.data\.train_path: '.*' is a folder; name a file of records$"):
        open_records(str(tmp_path), RULES, "train_path")
    with pytest.raises(ConfigError, match=r"config\.data\.train_path: no file matches '.*\*\.tar'"):
        open_records(f"{tmp_path}/*.tar", RULES, "train_path")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "set.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(
        ConfigError, match=r"set\.parquet: parquet files need pyarrow, .* pip install 'vlm_jax\[parquet\]'"
    ):
        open_records(str(tmp_path / "set.parquet"), RULES, "train_path")


def test_records_beyond_the_checked_ones_are_named_when_they_are_read(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps(said("q" if number != 2 else "<image>q", id="x")) for number in range(9)))
    rules = Rules(("vqa",), max_checked=3)  # the first, the middle and the last
    records = open_records(str(path), rules, "train_path")
    assert [records[index].record_id for index in (0, 1, 8)] == ["x@1", "x@2", "x@9"]
    with pytest.raises(MalformedRecords, match=r"set\.jsonl:3: .*1 placeholders <image>, but 0 images"):
        records[2]
    assert np.array_equal([len(record.messages) for record in map(records.__getitem__, (3, 4))], [2, 2])


def test_a_file_is_checked_once_and_again_after_it_has_changed(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(said("q")))
    first = open_records(str(path), RULES, "train_path")
    assert open_records(str(path), RULES, "train_path") is first
    before = first.fingerprint()
    path.write_text(json.dumps(said("another")))
    changed = open_records(str(path), RULES, "train_path")
    assert text_of(changed[0].messages[0]) == "another"
    assert changed.fingerprint() != before


def test_placeholders_of_a_prompt_do_not_change_the_data(tmp_path):
    """They refuse records, but change none: rows that were packed stay valid for another prompt."""
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(said("q")))
    plain, marked, other = (
        open_records(str(path), dataclasses.replace(RULES, **changes), "train_path")
        for changes in ({}, {"placeholders": ("<img>",)}, {"tasks": (*RULES.tasks, "more")})
    )
    assert plain.fingerprint() == marked.fingerprint() != other.fingerprint()
    with pytest.raises(MalformedRecords):
        open_records(str(path), dataclasses.replace(RULES, placeholders=("q",)), "train_path")
