"""What a user gives in a message: every item, key and text is read, or refused by its name."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.items import ITEM_TYPES
from vlm_jax.processors.learned import PromptError
from vlm_jax.processors.native import NativeViews, VideoLimits
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.spelled_prompt import DeepSeekVL2Prompt, QwenVLPrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import PatchFormat, VideoSize

from ...advice import tried
from ...processors.letters import MARKS, TEMPLATE, TOKENIZER

# In the manner of llava-hf: pictures first, then texts, and lists alone.
LISTS = ChatTemplate(
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] | selectattr('type', 'equalto', 'image') "
    "%}<image>{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }} "
    "{% endfor %}{% endfor %}"
)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))
TEXT = {"type": "text", "text": "What?"}
NATIVE = NativeViews(Pixels(), PatchFormat(4, 2, 2), qwen_size, 1024, 4096, video_limits=VideoLimits(256, 4096, 999))
ROW_OF_TYPES = [(name, key) for name, form in ITEM_TYPES.items() for key in form.sources]
SETTINGS = sorted({(form.kind, key) for form in ITEM_TYPES.values() for key in form.settings})


def processor(template=TEMPLATE, views=None):
    views = SquareViews(Pixels(), (4, 4), 3, "stretch") if views is None else views
    return Processor(TemplatePrompt(template, TOKENIZER, MARKS, MARKS), views, TOKENIZER, 2)


def user(*items):
    return [{"role": "user", "content": list(items)}]


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


def visual_tokens(batch) -> int:
    return int((np.asarray(batch.visual_index) >= 0).sum())


@pytest.mark.parametrize(("name", "key"), [pair for pair in ROW_OF_TYPES if "video" not in pair[0]])
def test_01_07_every_type_and_key_of_a_picture_is_read(tmp_path, name, key):
    (tmp_path / "a.png").write_bytes(png())
    path, encoded = str(tmp_path / "a.png"), base64.b64encode(png()).decode()
    value = {"text": "What?", "base64": encoded, "image_url": {"url": path, "detail": "auto"}}.get(key, path)
    batch = processor(LISTS)(user({"type": name, key: value}, TEXT))
    assert (batch.images is not None) == (name != "text")
    if batch.images is not None:
        wanted = processor(LISTS)(user({"type": "image"}, TEXT), images=[PICTURE])
        assert (batch.images == wanted.images).all() and (batch.tokens == wanted.tokens).all()


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "data:image/png;base64,{base64}", "~/a.png"])
def test_05_sources_of_a_picture(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(png())
    source = form.format(path=tmp_path / "a.png", base64=base64.b64encode(png()).decode())
    inside = processor()(user({"type": "image", "image": source}, TEXT))
    beside = processor()(user({"type": "image"}, TEXT), images=[source])
    assert (inside.images == beside.images).all()
    assert (inside.images == processor()(user({"type": "image"}, TEXT), images=[PICTURE]).images).all()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("https://example.invalid/a.png", "https://example.invalid/a.png is on the web.*allow_network=True"),
        ("ftp://example.invalid/a.png", "the scheme 'ftp' is not read"),
        ("file://host/a.png", "got the host 'host'"),
        ("data:image/png;base64,*", "not base64"),
        ("data:image/png,abc", "expected data:…;base64"),
    ],
)
def test_05_sources_that_are_not_read_are_told(source, told):
    with pytest.raises(CorruptImage, match=f"conversation 0, image 0: .*{told}"):
        processor()(user({"type": "image", "image": source}, TEXT))
    with pytest.raises(CorruptImage, match=f"conversation 0, video 0: .*{told}"):
        processor(views=NATIVE)(user({"type": "video", "video": source}, TEXT))


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (user({"type": "audio", "audio": "a.wav"}), "item 0: no item of type 'audio' is read"),
        (user({"type": "input_image", "image_url": "a.png"}), "no item of type 'input_image' is read; did you mean"),
        (user({"audio": "a.wav"}), "item 0: no item of type None is read"),
        (user({"type": ["text"], "text": "a"}), r"no item of type \['text'\] is read"),
        (user({"type": "text", "content": "a"}), "the key 'content' of an item of type 'text' is not read"),
        (user({"type": "text", "text": "a", "cache_control": {}}), "the key 'cache_control'"),
        (user({"type": "text", "text": 7}), "item 0: text: expected a text, got 7"),
        (user({"type": "text"}), "item 0: text: expected a text, got None"),
        (user({"type": "image", "image": "a.png", "path": "b.png"}), "expected one of the keys image and path"),
        (user({"type": "image", "image": 3}), "item 0: image: expected a path, .* got 3"),
        (user({"type": "image", "url": b"x"}), "item 0: url: expected a path or a URL, got a value of type bytes"),
        (user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}), "image_url.detail is not read"),
        (user("hi"), "item 0: expected a dict such as .* got 'hi'"),
        ([{"role": "user", "content": TEXT}], "content: expected a text or a list of items, got a value of ty"),
        ([{"role": "user", "content": 3}], "content: expected a text"),
        ([{"role": None, "content": "a"}], "role: expected a text such as 'user', got None"),
        ([{"content": "a"}], "role: expected a text"),
    ],
)  # fmt: skip
def test_01_07_what_is_not_read_is_told(message, told):
    with pytest.raises(PromptError, match=f"conversation 0: message 0.*{told}"):
        processor()(message)
    with pytest.raises(PromptError, match=told):
        processor().measure(message)


@pytest.mark.parametrize("content", ["Hello there", [{"text": "Hello there"}]])
def test_03_a_text_is_in_the_prompt_whatever_form_the_template_reads(content):
    batch = processor(LISTS)([{"role": "user", "content": content}])
    assert "Hello there" in TOKENIZER.decode(batch.tokens[0])


def test_30_a_picture_that_the_template_does_not_write_is_told():
    """Its place would be that of another picture: the mark in a text."""
    template = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    messages = [{"role": "tool", "content": [{"type": "image"}]}, {"role": "user", "content": "<image> or <image>"}]
    with pytest.raises(
        ChatTemplateError, match=tried("the template writes {2} of the {3} {image}s of the messages; give them in")
    ):
        processor(template)(messages, images=[PICTURE] * 3)
    read = user({"type": "image"}, TEXT)
    assert visual_tokens(processor(LISTS)(read, images=[PICTURE])) == 3


@pytest.mark.parametrize(("mark", "kind"), [("<image>", "image"), ("<video>", "video")])
def test_30_a_question_about_a_mark(mark, kind):
    told = re.escape(f"message 0 writes '{mark}', which stands for a {kind}")
    with pytest.raises(PictureMismatch, match=told):
        processor()(user({"type": "text", "text": f"What does {mark} do?"}))


@pytest.mark.parametrize("prompt", [DeepSeekVL2Prompt(TOKENIZER), QwenVLPrompt(TOKENIZER)])
def test_01_prompts_without_a_template_refuse_what_they_do_not_read(prompt):
    with pytest.raises(PromptError, match="an item of type 'video'; this model reads text, image"):
        prompt([{"role": "user", "content": [{"type": "video"}]}], ())
    with pytest.raises(PromptError, match="message 0: the key 'tool_calls' is not read"):
        prompt([{"role": "user", "content": "a", "tool_calls": []}], ())


def test_03_the_role_of_the_first_message():
    with pytest.raises(PromptError, match="message 0 has the role 'User'; expected user or assistant"):
        DeepSeekVL2Prompt(TOKENIZER)([{"role": "User", "content": "a"}], ())


def test_08_pixels_of_an_item():
    def count(**keys):
        return visual_tokens(processor(views=NATIVE)(user({"type": "image", "image": PICTURE, **keys}, TEXT)))

    assert count() == 64
    assert count(min_pixels=64, max_pixels=1024) == 16
    assert count(resized_height=16, resized_width=16) == 4
    assert count(resized_height=64, resized_width=16) == 16
    assert count(max_pixels=256) == 4  # below the release's minimum
    assert count(min_pixels=8192) >= 128  # above its maximum
    batch = processor(views=NATIVE)(
        user({"type": "image", "image": PICTURE, "max_pixels": 1024}, {"type": "image", "image": PICTURE}),
        targets=False,
    )
    assert visual_tokens(batch) == 16 + 64
    measured = processor(views=NATIVE).measure(user({"type": "image", "max_pixels": 1024}), [(80, 80)])
    assert measured == processor(views=NATIVE).example(
        user({"type": "image", "max_pixels": 1024}), [PICTURE], name="x").load  # fmt: skip


def test_08_pixels_of_a_video():
    frames = [PICTURE] * 4

    def count(**keys):
        return visual_tokens(processor(views=NATIVE)(user({"type": "video", "video": frames, **keys}, TEXT)))

    assert count() == 2 * 64
    assert count(max_pixels=1024) == count(total_pixels=2048) == 2 * 16
    assert count(resized_height=16, resized_width=32) == 2 * 8
    load = processor(views=NATIVE).measure(user({"type": "video", "max_pixels": 1024}), (), [VideoSize(4, 80, 80)])
    assert load.length == 2 * 16 + 2  # with the start of the text and the `!` of the answer


@pytest.mark.parametrize(("kind", "key"), SETTINGS)
@pytest.mark.parametrize("value", [0, -1, True, "4096", 1.5, [4096], float("nan"), 2**31])
def test_08_every_setting_of_an_item_has_a_range(kind, key, value):
    if key == "fps" and value in (1.5, 2**31) and value is not True:
        return  # a rate may be a fraction
    source = [PICTURE] * 2 if kind == "video" else PICTURE
    with pytest.raises(PictureMismatch, match=f"message 0, item 0: {key}"):
        processor(views=NATIVE)(user({"type": kind, kind: source, key: value}, TEXT))


@pytest.mark.parametrize(
    ("kind", "key"), [pair for pair in SETTINGS if pair[1] not in ("fps", "nframes", "min_frames")]
)
def test_08_a_system_of_fixed_sizes_refuses_settings_of_size(kind, key):
    keys = {"resized_height": 8, "resized_width": 8} if key.startswith("resized") else {key: 8}
    source = [PICTURE] * 2 if kind == "video" else PICTURE
    with pytest.raises(PictureMismatch, match=r"remove (the key from the item|its other settings)"):
        processor()(user({"type": kind, kind: source, **keys}, TEXT))


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), True])
def test_26_the_frame_rate_of_frames(fps):
    with pytest.raises(
        PictureMismatch, match="conversation 0: fps: expected a number of frames per second above 0, got"
    ):
        processor(views=NATIVE)(user({"type": "video"}, TEXT), videos=[[PICTURE] * 4], fps=fps)
