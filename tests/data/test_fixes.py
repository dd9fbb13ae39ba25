"""What messages on files of records advise works: a fault, the message, and what the corrected file or record holds."""

import json
import sys

import pytest
from array_record.python import array_record_module

from vlm_jax.config import ConfigError
from vlm_jax.data import scans
from vlm_jax.data.conversations import TooManyCorruptImages
from vlm_jax.data.loader import batches, join
from vlm_jax.data.packing import StalePlan, TooLargeForRow, pack_window
from vlm_jax.data.record_files import Rules, open_records
from vlm_jax.data.schemas import check_texts
from vlm_jax.data.spelling import Spelling
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.types import Load, RowShape

from ..advice import tried
from .test_conversations import numbers, opened
from .test_digits import opened as digits
from .test_loader import STREAM, row
from .test_message_schemas import item, record_of, turns
from .test_packing import plan
from .test_schemas import llava, text
from .test_stores import said, tar_bytes, values, write_tar

ONE, TWO = said("q"), said("q", id="\u00e9")
LINES = [json.dumps(one, ensure_ascii=False) + "\n" for one in (ONE, TWO)]


def array_record(folder):
    path = folder / "written"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(json.dumps(ONE).encode())
    writer.close()
    return path.read_bytes()


def tar(folder):
    write_tar(folder / "written", {"a.json": json.dumps(ONE).encode()})
    return (folder / "written").read_bytes()


# (content, message, corrected content or what writes it, number of records)
FILES = [
    (
        json.dumps(ONE, indent=1).encode(),
        tried("; the object goes on over several lines: write one object a line, or a JSON array of them"),
        LINES[0].encode(),
        1,
    ),
    (
        json.dumps(ONE, indent=1).encode(),
        tried("; the object goes on over several lines: write one object a line, or a JSON array of them"),
        json.dumps([ONE], indent=1).encode(),
        1,
    ),
    (
        json.dumps(ONE).encode() * 2,
        tried("; several objects are on the line: write one a line"),
        LINES[0].encode() * 2,
        2,
    ),
    (
        b"[%s]\n]" % json.dumps(ONE).encode(),
        tried("{2}: not a JSON array: {text follows the end of the array}; write one array, or one object a line"),
        b"[%s]" % json.dumps(ONE).encode(),
        1,
    ),
    (
        b"[%s]\n]" % json.dumps(ONE).encode(),
        tried("{2}: not a JSON array: {text follows the end of the array}; write one array, or one object a line"),
        "".join(LINES).encode(),
        2,
    ),
    (
        "".join(LINES).encode("latin-1"),
        tried("convert it: iconv -f {THE_ENCODING} -t UTF-8 FILE > NEW"),
        "".join(LINES).encode("latin-1").decode("latin-1").encode("utf-8"),
        2,
    ),
    (
        "".join(LINES).encode("utf-16"),
        tried("convert it: iconv -f {UTF-16} -t UTF-8 FILE > NEW"),
        "".join(LINES).encode("utf-16").decode("utf-16").encode("utf-8"),
        2,
    ),
    (tar_bytes()[:2000], tried("a tar that is cut off or damaged: {}; write it again"), tar, 1),
    (
        bytes.fromhex("83af70d10d884a3f") + b"\x00" * 99,
        tried("an ArrayRecord file that is cut off or damaged; write it again"),
        array_record,
        1,
    ),
]


@pytest.mark.parametrize(("content", "message", "corrected", "count"), FILES)
def test_a_file_that_is_written_as_said_is_read(tmp_path, content, message, corrected, count):
    path = tmp_path / "set"
    path.write_bytes(content)
    with pytest.raises(MalformedRecords, match=message):
        open_records(str(path), Rules(("vqa",)), "train_path")
    path.write_bytes(corrected if isinstance(corrected, bytes) else corrected(tmp_path))
    assert len(open_records(str(path), Rules(("vqa",)), "train_path")) == count


IMAGE = item("image", image="a.png")
# (record, message, corrected record, its images), in the folder /data
RECORDS = [
    (
        llava("q", "a", messages=turns("q", "a")),
        tried("both '{conversations}' and '{messages}' are given; keep one"),
        llava("q", "a"),
        (),
    ),
    (
        llava("q", "a", image="a.png", images=["b.png"]),
        tried("both '{image}' and '{images}' are given; keep one"),
        llava("q", "a", images=["b.png"]),
        ("/data/b.png",),
    ),
    (
        {"messages": turns([IMAGE, text("q")], "a"), "images": ["b.png"]},
        tried("{1} {image}s are in its items, and {1} are not; give all in items, or all in '{image}s'"),
        {"messages": turns([IMAGE, item("image", image="b.png"), text("q")], "a")},
        ("/data/a.png", "/data/b.png"),
    ),
    (
        {"messages": turns([IMAGE, text("q")], "a"), "images": ["b.png"]},
        tried("{1} {image}s are in its items, and {1} are not; give all in items, or all in '{image}s'"),
        {"messages": turns([item("image"), item("image"), text("q")], "a"), "images": ["a.png", "b.png"]},
        ("/data/a.png", "/data/b.png"),
    ),
    (
        {"messages": turns([text("<image>q")], "a"), "images": ["b.png"]},
        tried('{<image>} in the text of an item; write {{"type": "{image}"}} items instead'),
        {"messages": turns([item("image"), text("q")], "a"), "images": ["b.png"]},
        ("/data/b.png",),
    ),
    (
        llava("q", "a", imgae="a.png"),
        tried("unknown key '{imgae}'; did you mean '{image}'?"),
        llava("q", "a", image="a.png"),
        ("/data/a.png",),
    ),
    (
        llava("q", "a", file_name="a.png"),
        tried("unknown key '{file_name}' holds {pictures or videos}, which would be lost; rename it to one of {}"),
        llava("q", "a", image="a.png"),
        ("/data/a.png",),
    ),
    (
        llava("q", "a", file_name="a.png"),
        tried("unknown key '{file_name}' holds {pictures or videos}, which would be lost; rename it to one of {}"),
        llava("q", "a"),
        (),
    ),
    (
        llava("q", "a", image="https://a/b.png"),
        tried("{'https://a/b.png'} is on the web; download it and name the file"),
        llava("q", "a", image="b.png"),
        ("/data/b.png",),
    ),
]


@pytest.mark.parametrize(("record", "message", "corrected", "images"), RECORDS)
def test_a_record_that_is_written_as_said_is_read(record, message, corrected, images):
    with pytest.raises(ValueError, match=message):
        record_of(record)
    assert record_of(corrected).images == images


def test_a_column_may_be_named_in_the_config_and_stands_there_once():
    spelling = Spelling(columns={"images": "file_name"})
    assert record_of(llava("q", "a", file_name="a.png"), spelling).images == ("/data/a.png",)
    with pytest.raises(
        ValueError, match=tried("both '{file_name}' (config.data.columns.{images}) and '{images}' are given; keep")
    ):
        record_of(llava("q", "a", file_name="a.png", images=["b.png"]), spelling)


def test_marks_of_a_prompt_are_left_out_of_texts():
    with pytest.raises(
        ValueError, match=tried("in this model's prompt; remove it, since files without placeholders come first")
    ):
        check_texts([{"role": "user", "content": "<pad> what"}], ("<pad>",))
    assert check_texts([{"role": "user", "content": "what"}], ("<pad>",)) is None


def test_a_folder_is_named_by_its_file_or_pattern(tmp_path):
    (tmp_path / "set.jsonl").write_text(LINES[0])
    with pytest.raises(ConfigError, match=tried("is a folder; name a file of records{}") + ".*jsonl"):
        values(tmp_path)
    assert values(tmp_path / "set.jsonl") == values(f"{tmp_path}/*.jsonl") == [ONE]


def test_parquet_needs_its_package_or_jsonl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "set").write_bytes(b"PAR1 and more")
    with pytest.raises(ConfigError, match=tried("pip install 'vlm_jax[parquet]', or write the rows as JSONL")):
        values(tmp_path / "set")
    (tmp_path / "set").write_text("".join(LINES))
    assert values(tmp_path / "set") == [ONE, TWO]


def test_a_record_without_its_image_is_repaired_or_the_limit_raised(tmp_path):
    advised = tried("over config.data.max_corrupt={0}:\n{}\nRepair or remove them, or raise the limit.")
    with pytest.raises(TooManyCorruptImages, match=advised):
        numbers(opened(tmp_path, corrupt=(2,)).train("questions", seed=0), 10)
    assert 2 not in numbers(opened(tmp_path, corrupt=(2,), max_corrupt=1).train("questions", seed=0), 10)
    assert sorted(numbers(opened(tmp_path).train("questions", seed=0), 10)) == list(range(10))


# (fault of config.data, message, fix)
SETTINGS = [
    (
        {"mixture": {"a": {"path": "{folder}/train.jsonl"}}},
        tried("config.data.mixture names the training files; set it to None"),
        {"train_path": None},
    ),
    (
        {"train_path": None, "evaluation_path": None, "held_out": 2},
        tried("config.data.held_out: is of train_path, which is None; set evaluation_path instead"),
        {"held_out": 0, "evaluation_path": "{folder}/test.jsonl"},
    ),
]


@pytest.mark.parametrize(("fault", "message", "fix"), SETTINGS)
def test_settings_that_are_set_as_said_are_met(tmp_path, fault, message, fix):
    def given(changes):
        if isinstance(changes, dict):
            return {key: given(value) for key, value in changes.items()}
        return changes.format(folder=tmp_path) if isinstance(changes, str) else changes

    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **given(fault))
    assert len(list(opened(tmp_path, **given({**fault, **fix})).evaluation(seed=0))) == 6


@pytest.mark.parametrize("fix", [{"train_path": "train"}, {"mixture": {"a": {"path": "train"}}}])
def test_a_stage_needs_a_training_file(tmp_path, fix):
    advised = tried("a stage trains on it, and it is None; name the training file, or set config.data.mixture")
    with pytest.raises(ConfigError, match=advised):
        opened(tmp_path, train_path=None).train("questions", seed=0)
    path = str(tmp_path / "train.jsonl")
    fix = {"train_path": path} if "train_path" in fix else {"train_path": None, "mixture": {"a": {"path": path}}}
    assert sorted(numbers(opened(tmp_path, **fix).train("questions", seed=0), 10)) == list(range(10))


def test_pages_of_digits_have_tasks_and_digits_that_fit():
    with pytest.raises(ConfigError, match=tried("config.data.task_weights: no task has a weight above 0; set one of ")):
        digits(task_weights={"read": 0.0})
    assert digits(task_weights={"read": 1.0}).tasks
    with pytest.raises(ConfigError, match=tried("pixels); set it to {12} or less, or enlarge page_size")):
        digits(max_digit=13)
    assert digits(max_digit=12).tasks


def test_a_batch_is_divided_and_of_one_size():
    with pytest.raises(ConfigError, match=tried("over {2} shards; set it to a positive multiple of {2}")):
        batches(STREAM, 5, shard_count=2)
    assert next(iter(batches(STREAM, 4, shard_count=2))).tokens.shape[0] == 2
    with pytest.raises(
        ValueError, match=tried("differ in shape: {[(3,), (5,)]}; resize the images and pad the rows to one size")
    ):
        join([row(0), row(1, length=5)])
    assert join([row(0, length=5), row(1, length=5)]).tokens.shape == (2, 5)


@pytest.mark.parametrize(
    ("load", "shape"), [(Load(21, 0), RowShape(21, 4)), (Load(20, 0), RowShape(20, 4)), (None, RowShape(20, 4))]
)
def test_a_sample_that_fits_no_row_gets_a_longer_one_fewer_tokens_or_leaves(load, shape):
    others = [Load(5, 1)]
    with pytest.raises(
        TooLargeForRow, match=tried("\nRaise the key, lower config.token_budget, or remove the samples")
    ):
        pack_window([Load(21, 0), *others], RowShape(20, 4), "sample '{}'".format)
    kept = others if load is None else [load, *others]
    rows = pack_window(kept, shape, "sample '{}'".format)
    assert sorted(index for one in rows for index in one) == list(range(len(kept)))


def test_a_stale_plan_is_removed(tmp_path):
    options = {"folder": tmp_path, "fingerprint": "data"}
    first = plan(**options)[0]
    (folder,) = tmp_path.iterdir()
    (file,) = folder.iterdir()
    file.write_bytes(b"")
    with pytest.raises(StalePlan, match=tried("the data changed with the same fingerprint; remove the folder")):
        plan(lambda element: Load(20, 0), **options)[0]
    (folder / "00000000-99.npz").write_bytes(b"")
    with pytest.raises(StalePlan, match=tried("window {0} has files for {} and for {} rows; remove the folder")):
        plan(**options)[0]
    for one in folder.iterdir():
        one.unlink()
    folder.rmdir()
    assert plan(**options)[0] == first


def test_scans_need_scikit_learn(monkeypatch):
    monkeypatch.setattr(scans.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=tried("install it: pip install scikit-learn")):
        scans._read_table()
    monkeypatch.undo()
    assert scans._read_table().shape == (1797, 65)
