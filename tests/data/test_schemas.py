"""Files of conversations in every schema: what is parsed, and which records are rejected."""

import gzip
import json
import logging

import pytest

from vlm_jax.data.record_files import Rules, open_records
from vlm_jax.data.stores import MalformedRecords

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(content):
    return {"role": "assistant", "content": content}


def llava(*values, **fields):
    """A record as LLaVA writes it: human and gpt take turns."""
    turns = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]
    return {"id": "x", "conversations": turns, **fields}


def read(folder, *records, name="set.jsonl", num_images=None):
    path = folder / name
    array = name.endswith(".json")
    path.write_text(json.dumps(records, indent=1) if array else "\n".join(map(json.dumps, records)))
    return list(open_records(str(path), Rules(("vqa", "chat"), num_images), "train_path"))


@pytest.mark.parametrize(
    ("value", "num_images", "content"),
    [
        ("<image>\nWhat?", 1, [IMAGE, text("What?")]),
        ("What?\n<image>", 1, [text("What?"), IMAGE]),
        ("What?\n<image>\n<image>", 2, [text("What?"), IMAGE, IMAGE]),
        ("<image>", 1, [IMAGE]),
        ("What?", 2, [IMAGE, IMAGE, text("What?")]),
        ("What?", 0, [text("What?")]),
        ("Is <image> like <image>\n?", 2, [text("Is "), IMAGE, text(" like "), IMAGE, text("?")]),
        ("A: <image>\nB: <image>\nSo?", 2, [text("A: "), IMAGE, text("B: "), IMAGE, text("So?")]),
    ],
)
def test_images_stand_where_the_placeholders_are_or_first(tmp_path, value, num_images, content):
    record = llava(value, "An answer.", image=[f"{place}.png" for place in range(num_images)])
    (made,) = read(tmp_path, record)
    assert made.messages == (user(*content), assistant("An answer."))
    assert made.images == tuple(f"{tmp_path}/{place}.png" for place in range(num_images))


def test_images_of_later_turns_and_a_system_turn(tmp_path):
    record = llava("<image>\nOne?", "1", "<image>\nTwo?", "2", image=["a.png", "b.png"], task="chat")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (made,) = read(tmp_path, record)
    assert made.messages == (
        {"role": "system", "content": "Be brief."},
        *(user(IMAGE, text("One?")), assistant("1"), user(IMAGE, text("Two?")), assistant("2")),
    )
    assert made.task == "chat"


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
def test_every_schema_and_spelling_gives_the_same_messages(tmp_path, name):
    spoken = [
        ("human", "user", "<image>\nq"),
        ("gpt", "assistant", "a"),
        ("human", "user", "r"),
        ("gpt", "assistant", "b"),
    ]
    records = read(
        tmp_path,
        {"id": 1, "image": "i.png", "turns": [["q", "a"], ["r", "b"]]},
        {"id": 2, "image": "i.png", "conversations": [{"from": s, "value": v} for s, _, v in spoken]},
        {"id": 3, "image": ["i.png"], "conversations": [{"role": r, "content": v} for _, r, v in spoken]},
        {"id": 4, "image": "i.png", "conversations": [{"from": r, "value": v} for _, r, v in spoken], "model": ""},
        name=name,
        num_images=1,
    )
    assert [record.record_id for record in records] == ["1", "2", "3", "4"]
    for record in records:
        assert record.messages == (user(IMAGE, text("q")), assistant("a"), user(text("r")), assistant("b"))
        assert record.task == "vqa"
        assert record.images == (f"{tmp_path}/i.png",)


def test_a_question_and_its_answer_with_two_images_and_a_literal_placeholder(tmp_path):
    (made,) = read(tmp_path, {"id": 1, "image": ["a", "b"], "question": "what is <image>?", "answer": "<image>"})
    assert made.messages == (user(IMAGE, IMAGE, text("what is <image>?")), assistant("<image>"))


@pytest.mark.parametrize("image", [None, "", []])
def test_a_conversation_without_a_picture(tmp_path, image):
    records = read(tmp_path, llava("Hello.", "Hi."), llava("Hello.", "Hi.", id="y", image=image))
    assert [record.images for record in records] == [(), ()]
    assert records[1].messages == (user(text("Hello.")), assistant("Hi."))


def test_repeated_and_missing_ids_are_told_apart_by_their_line(tmp_path):
    records = read(tmp_path, llava("q", "a"), llava("r", "b"), llava("s", "c", id="y"))
    assert [record.record_id for record in records] == ["x", "x@2", "y"]
    assert [record.record_id for record in read(tmp_path, *[llava("q", "a")] * 2, name="set.json")] == ["x", "x@1"]
    unnamed = {"conversations": llava("q", "a")["conversations"]}
    assert [record.record_id for record in read(tmp_path, unnamed, llava("q", "a"), unnamed)] == ["1", "x", "3"]


def test_an_answer_before_the_first_question_is_left_out_with_a_warning(tmp_path, caplog):
    record = llava("Hello.", "Hi.")
    record["conversations"].insert(0, {"from": "gpt", "value": "Yes?"})
    with caplog.at_level(logging.WARNING):
        records = read(tmp_path, record, llava("q", "a"))
    assert records[0].messages == (user(text("Hello.")), assistant("Hi."))
    assert "1 records begin with an assistant's turn" in caplog.text


def test_gzip_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "set.json.gz").write_bytes(gzip.compress(json.dumps([llava("é", "a")], ensure_ascii=False).encode()))
    (tmp_path / "set.jsonl").write_text(json.dumps(llava("é", "a")), encoding="utf-8-sig")
    for name in ("set.json.gz", "set.jsonl"):
        (record,) = open_records(str(tmp_path / name), Rules(("vqa",)), "train_path")
        assert record.messages[0] == user(text("é"))


def turn(**fields):
    return {"id": "x", "conversations": [fields, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (llava("<image>\nq", "a"), "1 placeholders <image>, but 0 images"),
        (llava("<image>\nq", "a", image=["a", "b"]), "1 placeholders <image>, but 2 images"),
        (llava("<image>q", "a", "<image>", "b", image="a"), "2 placeholders <image>, but 1 images"),
        (llava("q", "<image>", image="a"), "turn 2: <image> in a turn of the assistant"),
        (llava("q"), "an assistant last and a system turn only first, got user$"),
        (llava("q", "a", "r"), "got user, assistant, user$"),
        (
            {"id": "x", "conversations": [*llava("q", "a")["conversations"]] * 2 + [{"from": "system", "value": "s"}]},
            "system$",
        ),
        ({"id": "x", "conversations": [{"from": "gpt", "value": "a"}]}, "alternating user and assistant .* got $"),
        ({"id": "x", "conversations": []}, r"conversations: expected a list of turns, got \[\]"),
        ({"id": "x", "conversation": []}, "unknown key 'conversation'; did you mean 'conversations'"),
        (llava("q", "a", imge="b"), "unknown key 'imge'; did you mean 'image'"),
        (llava("q", "a", question="b"), "both 'conversations' and 'question' are given"),
        (llava("q", "a", image=[1]), "image: expected a path, a data URL or bytes, got 1"),
        (llava("q", "a", id=1.5), "id: expected a string or an integer, got 1.5"),
        (turn(**{"from": "humn", "value": "q"}), "turn 1: unknown speaker 'humn'; did you mean 'human'"),
        (turn(role="user", value="q"), "turn 1: unknown key 'value'; known here: content, role"),
        (turn(**{"from": "human", "valu": "q"}), "turn 1: unknown key 'valu'; did you mean 'value'"),
        (turn(role="user"), "turn 1: key 'content' is missing"),
        (turn(**{"from": "human", "value": ""}), "turn 1: expected a non-empty string, got ''"),
        ({"id": "x", "conversations": ["q", "a"]}, "turn 1: expected a JSON object, got str"),
    ],
)
def test_a_faulty_conversation_is_named_by_line_or_index(tmp_path, record, message):
    with pytest.raises(MalformedRecords, match=rf"1 lines .*\n.*set\.jsonl:2: .*{message}"):
        read(tmp_path, llava("q", "a", id="y"), record)
    with pytest.raises(MalformedRecords, match=rf"1 elements .*\n.*set\.json\[1\]: .*{message}"):
        read(tmp_path, llava("q", "a", id="y"), record, name="set.json")


def test_all_faults_of_an_array_are_in_one_error(tmp_path):
    with pytest.raises(MalformedRecords) as caught:
        read(tmp_path, "a line", llava("q", "a"), llava("q"), name="set.json")
    lines = str(caught.value).split("\n")
    assert lines[0] == "2 elements are not valid records of conversations:"
    assert lines[1].endswith("set.json[0]: expected a JSON object, got str")
    assert "set.json[2]: " in lines[2]
    with pytest.raises(MalformedRecords, match=r"set\.jsonl:1: 0 images, but config\.data\.num_images is 1"):
        read(tmp_path, llava("q", "a"), num_images=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": 1},\n{"id": 2]', r"set\.json:2: not a JSON array"),
        ("[1]".encode("utf-16"), r"set\.json:1: expected UTF-8 text, got UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        ("[1]".encode("utf-16-le"), r"set\.json:1: expected UTF-8 text, got UTF-16 without a byte order mark"),
        ('[1,\n"é"]'.encode("latin-1"), r"set\.json\[1\]: \(line 2\) expected UTF-8 text, got the byte 0xe9"),
        (b"[1, 2]\n[3]", r"set\.json:2: not a JSON array: text follows the end of the array"),
        (b"PK\x03\x04", r"set\.json: this is a zip archive; expected a JSON array, JSONL, parquet"),
        (gzip.compress(b"[]" * 99, mtime=0)[:-9], r"set\.json: expected UTF-8 text, plain or compressed by gzip"),
    ],
)
def test_a_file_that_is_no_text_or_no_array_is_named(tmp_path, content, message):
    path = tmp_path / "set.json"
    path.write_bytes(content)
    with pytest.raises(MalformedRecords, match=message):
        open_records(str(path), Rules(("vqa",)), "train_path")
