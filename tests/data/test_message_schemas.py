"""Schemas of OpenAI, TRL, LLaMA-Factory, Cauldron, FineVision and Qwen; names that are set; keys that no schema has."""

import base64
import logging

import pytest

from vlm_jax.config import ConfigError
from vlm_jax.data import media
from vlm_jax.data.record_files import Rules, open_records
from vlm_jax.data.schemas import Reader
from vlm_jax.data.spelling import Notes, Spelling, misspelt
from vlm_jax.data.stores import MalformedRecords

from .test_schemas import IMAGE, assistant, llava, read, text, user

VIDEO = {"type": "video"}
URL = "data:image/png;base64," + base64.b64encode(b"picture").decode()


def record_of(fields, spelling=None, notes=None):
    """What one record says, in the folder /data."""
    return Reader("/data", ("vqa",), spelling or Spelling(), notes or Notes()).record(fields)


def turns(*contents, **further):
    """OpenAI's messages: user and assistant take turns."""
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": value, **further} for place, value in enumerate(contents)]


def item(kind, **fields):
    return {"type": kind, **fields}


@pytest.mark.parametrize(
    ("fields", "contents", "images"),
    [
        # OpenAI: paths, file:// and data URLs inside of the items.
        (
            {
                "messages": turns(
                    [item("text", text="q"), item("image_url", image_url={"url": URL, "detail": "low"})], "a"
                )
            },
            [user(text("q"), IMAGE), assistant("a")],
            [URL],
        ),
        (
            {"messages": turns([item("image_url", image_url="file:///a%20b/c.png"), item("text", text="q")], "a")},
            [user(IMAGE, text("q")), assistant("a")],
            ["/a b/c.png"],
        ),
        (
            {
                "messages": turns(
                    [item("image", image="a.png"), item("image", image="/b.png")], [item("text", text="a")]
                )
            },
            [user(IMAGE, IMAGE), assistant("a")],
            ["/data/a.png", "/b.png"],
        ),
        # TRL: items stand for the pictures of `images`; rows of a table have None where an item lacks a key.
        (
            {
                "messages": turns(
                    [item("text", text="q", image=None), item("image", text=None), item("image", text=None)], "a"
                ),
                "images": [{"bytes": b"one", "path": None}, {"bytes": None, "path": "b.png"}],
            },
            [user(text("q"), IMAGE, IMAGE), assistant("a")],
            [b"one", "/data/b.png"],
        ),
        ({"messages": turns("q", "a"), "images": ["a.png"]}, [user(IMAGE, text("q")), assistant("a")], ["/data/a.png"]),
        ({"prompt": "q", "completion": "a"}, [user(text("q")), assistant("a")], []),
        (
            {"prompt": turns("q", "a", "r"), "completion": turns("", "b")[1:], "image": "a.png"},
            [user(IMAGE, text("q")), {**assistant("a"), "loss": False}, user(text("r")), assistant("b")],
            ["/data/a.png"],
        ),
        # LLaMA-Factory.
        (
            {"messages": turns("<image><image>q", "a"), "images": ["a.png", "b.png"], "system": "s"},
            [{"role": "system", "content": "s"}, user(IMAGE, IMAGE, text("q")), assistant("a")],
            ["/data/a.png", "/data/b.png"],
        ),
        # Cauldron and FineVision.
        (
            {"images": [{"bytes": b"1", "path": "x"}], "texts": [{"user": "q", "assistant": "a", "source": "s"}] * 2},
            [user(IMAGE, text("q")), assistant("a"), user(text("q")), assistant("a")],
            [b"1"],
        ),
        ({"images": [], "texts": [{"user": "q", "assistant": "a"}]}, [user(text("q")), assistant("a")], []),
        ({"image": "a.png", "caption": "a page"}, [user(IMAGE), assistant("a page")], ["/data/a.png"]),
        ({"question": "q", "answer": "a"}, [user(text("q")), assistant("a")], []),
    ],
)
def test_a_schema_says_the_same_as_its_messages(fields, contents, images):
    record = record_of(fields)
    assert list(record.messages) == contents
    assert list(record.images) == images


def test_videos_are_counted_apart_from_pictures():
    record = record_of(llava("<video>\n<image>\nq <video>", "a", image="i.png", video=["v.mp4", "w.mp4"]))
    assert record.messages[0] == user(VIDEO, IMAGE, text("q "), VIDEO)
    assert (record.images, record.videos) == (("/data/i.png",), ("/data/v.mp4", "/data/w.mp4"))
    assert record_of(llava("q", "a", videos=["v.mp4"])).messages[0] == user(VIDEO, text("q"))
    for given in ({"type": "video", "video": "v.mp4"}, {"type": "video_url", "video_url": {"url": "v.mp4"}}):
        record = record_of({"messages": turns([given, text("q")], "a")})
        assert (record.messages[0], record.videos) == (user(VIDEO, text("q")), ("/data/v.mp4",))
    with pytest.raises(ValueError, match="2 placeholders <video>, but 1 videos"):
        record_of(llava("<video><video>q", "a", video="v.mp4"))


def test_weights_of_messages_are_passed_on():
    said = turns("q", "a", "r", "b")
    said[1]["weight"], said[3]["loss"] = 0.5, False
    record = record_of({"messages": said})
    assert record.messages == (
        *(user(text("q")), {**assistant("a"), "weight": 0.5}),
        *(user(text("r")), {**assistant("b"), "loss": False}),
    )
    for bad in (-1, "1", float("inf")):
        said[1]["weight"] = bad
        with pytest.raises(
            ValueError, match="messages, turn 2: weight: expected true, false or a number of at least 0"
        ):
            record_of({"messages": said})


def test_names_of_keys_speakers_and_tags_can_be_set():
    spelling = Spelling(
        {"messages": "dialog", "images": "pics", "system": "persona"},
        {"role_tag": "who", "content_tag": "what", "user_tag": "client", "assistant_tag": "bot", "image_tag": "[IMG]"},
    )
    said = [{"who": "client", "what": "[IMG]\nis <image> a tag?"}, {"who": "bot", "what": "no"}]
    record = record_of({"dialog": said, "pics": ["a.png"], "persona": "brief"}, spelling)
    assert record.messages == (
        *({"role": "system", "content": "brief"}, user(IMAGE, text("is <image> a tag?")), assistant("no")),
    )
    assert record.images == ("/data/a.png",)
    with pytest.raises(ValueError, match=r"both 'dialog' \(config\.data\.columns\.messages\) and 'messages' are given"):
        record_of({"dialog": said, "messages": said}, spelling)
    with pytest.raises(ConfigError, match=r"config\.data\.columns\.message: .*did you mean 'messages'"):
        Spelling({"message": "dialog"})
    with pytest.raises(ConfigError, match=r"config\.data\.tags: role_tag and content_tag are set together"):
        Spelling({}, {"role_tag": "who"})


def test_other_keys_are_named_once_with_their_numbers(tmp_path, caplog):
    records = [
        llava("<image>q", "a", id="0", image="a.png", model="m", width=3, source_path="a.png", url="http://a/b.png"),
        llava("q", "a", id="1", model="m", relevance_ratings=[5, 4]),
        {"messages": turns("q", "a", name="n"), "id": "2", "model": None},
    ]
    with caplog.at_level(logging.WARNING):
        read(tmp_path, *records)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith(
        "set.jsonl: keys that no schema has are ignored, with their numbers: model (2), messages.name (2), width (1), "
        "source_path (1), url (1), relevance_ratings (1)"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"imgae": 3}, "unknown key 'imgae'; did you mean 'image'"),
        ({"vidoes": 3}, "unknown key 'vidoes'; did you mean 'videos'"),
        ({"file_name": "b.JPG"}, "unknown key 'file_name' holds pictures or videos, which would be lost; rename it to"),
        ({"frames": ["a.mp4"]}, "unknown key 'frames' holds pictures or videos"),
        ({"picture": {"bytes": b"1", "path": None}}, "unknown key 'picture' holds pictures or videos"),
        ({"picture": URL}, "unknown key 'picture' holds pictures or videos"),
        ({"rejected": turns("q", "a")}, "key 'chosen' is missing"),
        ({"rejected_turns": turns("q", "a")}, "unknown key 'rejected_turns' holds turns, which would be lost"),
        ({"qa_pairs": [{"user": "q", "assistant": "a"}]}, "unknown key 'qa_pairs' holds turns"),
        ({"messages": turns("q", "a")}, "both 'conversations' and 'messages' are given; keep one"),
        ({"images": ["b.png"], "image": "a.png"}, "both 'image' and 'images' are given; keep one"),
        ({"image": "https://a/b.png"}, r"image: 'https://a/b\.png' is on the web; download it and name the file"),
        ({"system": ["s"]}, r"system: expected a text, got \['s'\]"),
    ],
)
def test_a_key_that_would_be_lost_is_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        record_of(llava("q", "a", **extra))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": turns([item("imge")], "a")},
            "messages, turn 1, item 1: unknown type 'imge'; did you mean 'image'",
        ),
        (
            {"messages": turns([item("text", text="")], "a")},
            "turn 1, item 1: text: expected a non-empty string, got ''",
        ),
        ({"messages": turns([item("text", text="q", url="a.png")], "a")}, "item 1: unknown key 'url' holds pictures"),
        ({"messages": turns("q", [item("image", image="a.png")])}, "turn 2: image in a turn of the assistant"),
        (
            {"messages": turns([item("image"), item("image", image="a.png"), text("q")], "a")},
            "messages: 1 images are in its items, and 1 are not; give all in items, or all in 'images'",
        ),
        (
            {"messages": turns([item("image", image="a.png"), text("q")], "a"), "images": ["b.png"]},
            "messages: 1 images are in its items, and 1 are not",
        ),
        ({"messages": turns([text("<image>q")], "a"), "images": ["b.png"]}, 'write {"type": "image"} items instead'),
        ({"messages": turns("q", "a", tool_calls=turns("q", "a"))}, "turn 1: unknown key 'tool_calls' holds turns"),
        ({"messages": [*turns("q"), {"role": "tool", "content": "a"}]}, "turn 2: unknown speaker 'tool'"),
        ({"prompt": "q"}, "key 'completion' is missing"),
        ({"completion": "q"}, "key 'prompt' is missing"),
        ({"texts": [{"user": "q"}]}, "texts, turn 1: key 'assistant' is missing"),
        ({"texts": [{"usr": "q", "assistant": "a"}]}, "texts, turn 1: unknown key 'usr'; did you mean 'user'"),
        ({"question": "q", "answer": "a", "references": "a"}, "references: expected a list of texts, none .* got 'a'"),
        ({"question": "q", "answer": "a", "references": ["a", ""]}, r"references: expected .* got \['a', ''\]"),
        ({"question": "q", "answer": "a", "references": [["a"]]}, r"references: expected .* got \[\['a'\]\]"),
        (
            {"turns": [["q", "a"], ["r", "b"]], "references": [["a"]]},
            r"references: expected a list of texts for each of the 2 turns, .* got \[\['a'\]\]",
        ),
        ({"caption": "a"}, "caption: expected an image or a video, got none"),
        ({"image": "a.png", "rating": 3}, "no key with turns: expected one of conversations, .* got image, rating"),
    ],
)
def test_a_faulty_record_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        record_of(fields)


def test_several_right_answers():
    people = ["a", "a", "b"]
    assert record_of({"question": "q", "answer": "a", "references": people}).references == (("a", "a", "b"),)
    assert record_of(llava("q", "a", references=people)).references == (("a", "a", "b"),)
    record = record_of({"turns": [["q", "a"], ["r", "b"]], "references": [people, ["b"]]})
    assert record.references == (("a", "a", "b"), ("b",))
    for none in (None, []):
        assert record_of({"question": "q", "answer": "a", "references": none}).references == ()


def test_bytes_of_references():
    assert media.content(media.media(URL, "")) == b"picture"
    with pytest.raises(ValueError, match="not base64"):
        media.content("data:image/png;base64,a")
    with pytest.raises(ValueError, match=r"expected data:…;base64,…, got data:image/svg\+xml,x"):
        media.content("data:image/svg+xml,x")


def test_misspellings_are_within_two_edits():
    known = ("id", "image", "weight")
    assert [misspelt(name, known) for name in ("imge", "width", "uid", "iamge")] == ["image", None, None, "image"]


def test_names_that_are_set_reach_the_file(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"dialog": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}')
    (record,) = open_records(str(path), Rules(("vqa",), spelling=Spelling({"messages": "dialog"})), "train_path")
    assert record.messages == (user(text("q")), assistant("a"))
    with pytest.raises(MalformedRecords, match=r"set\.jsonl:1: no key with turns: expected .*, got dialog"):
        open_records(str(path), Rules(("vqa",)), "train_path")


def test_pairs_of_answers_as_trl_writes_them(tmp_path):
    """Texts, completions of a prompt, and conversations that begin alike: what both begin with is not learned."""
    first, second = turns("<image>q", "a", "r", "b"), turns("<image>q", "a", "r", "c")
    records = read(
        tmp_path,
        {"prompt": "<image>q", "chosen": "good", "rejected": "bad", "images": ["a.png"]},
        {"prompt": first[:3], "chosen": first[3:], "rejected": second[3:], "image": "a.png"},
        {"chosen": first, "rejected": second, "image": "a.png", "system": "s"},
        {"chosen": turns([item("image", image="a.png")], "b"), "rejected": turns([item("image", image="a.png")], "c")},
    )
    asked, held = user(IMAGE, text("q")), {**assistant("a"), "loss": False}
    assert records[0].messages == (asked, assistant("good")) and records[0].rejected == (asked, assistant("bad"))
    for record, system in ((records[1], ()), (records[2], ({"role": "system", "content": "s"},))):
        begin = (*system, asked, held, user(text("r")))
        assert record.messages == (*begin, assistant("b")) and record.rejected == (*begin, assistant("c"))
    assert [record.images for record in records] == [(f"{tmp_path}/a.png",)] * 4
    assert records[3].rejected == (user(IMAGE), assistant("c"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "key 'rejected' is missing"),
        ({"prompt": "q", "rejected": "a"}, "key 'chosen' is missing"),
        ({"chosen": "a", "rejected": "b"}, "rejected: expected a list of turns, or a text with the key 'prompt'"),
        (
            {"chosen": turns("q", "a"), "rejected": turns("q")},
            "rejected: expected alternating user and assistant turns",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "completion": "c"},
            "both 'chosen' and 'completion' are given",
        ),
    ],
)
def test_what_is_no_pair_of_answers(fields, message):
    with pytest.raises(ValueError, match=message):
        record_of(fields)
