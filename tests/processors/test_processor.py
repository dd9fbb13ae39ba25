"""The processor of a system, over a small template: placeholders, and errors."""

import dataclasses
import inspect
import re

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.crops import CropViews
from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.native import NativeViews, VolumeLimits
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt, TiledText
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.spelled_prompt import PromptError
from vlm_jax.processors.split_tiles import SplitViews
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiles import FixedTilesViews, InternVLViews, Ovis2Views
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import PatchFormat, RowShape, VideoSize

from .letters import MARKS, TEMPLATE, TOKENIZER, Letters

SQUARE = SquareViews(Pixels(), (4, 4), 3, "stretch")


def processor(views=SQUARE, tokens=MARKS, **fields):
    prompt = {key: fields.pop(key) for key in ("texts", "split", "joined", "tiled") if key in fields}
    return Processor(TemplatePrompt(TEMPLATE, TOKENIZER, MARKS, tokens, **prompt), views, TOKENIZER, 2, **fields)


def picture(height=4, width=4, value=0):
    return np.full((height, width, 3), value, np.uint8)


def say(*parts):
    kinds = {"<image>": {"type": "image"}, "<video>": {"type": "video"}}
    return [{"role": "user", "content": [kinds.get(part, {"type": "text", "text": part}) for part in parts]}]


def letters(text):
    return Letters().encode(text, False)


def test_places_are_filled_in_the_order_of_the_text():
    batch = processor()(say("a", "<image>", "b", "<image>"), [picture(value=10), picture(value=20)])
    np.testing.assert_array_equal(batch.tokens[0], [1, *letters("a"), 3, 3, 3, *letters("b"), 3, 3, 3, *letters("!")])
    np.testing.assert_array_equal(batch.visual_index[0], [-1, -1, 0, 1, 2, -1, 3, 4, 5, -1])
    np.testing.assert_array_equal(batch.positions[0], range(10))
    assert batch.images.shape == (1, 2, 4, 4, 3)
    np.testing.assert_allclose(batch.images[0, :, 0, 0, 0], [10 / 255, 20 / 255])
    assert batch.targets is None


def test_pictures_may_stand_in_the_messages():
    messages = say("<image>", "a")
    inside = [
        {"role": "user", "content": [{"type": "image", "image": picture(value=9)}, {"type": "text", "text": "a"}]}
    ]
    beside = processor()(messages, [picture(value=9)])
    found = processor()(inside)
    np.testing.assert_array_equal(found.tokens, beside.tokens)
    np.testing.assert_array_equal(found.images, beside.images)
    with pytest.raises(PictureMismatch, match="conversation 0: images are given both in its messages and separately"):
        processor()(inside, [picture()])


def test_learned_rows_stand_first_and_have_ids_of_their_own():
    views = Ovis2Views(Pixels(), 4, 2)
    batch = processor(views, num_learned=5, learned_ids=(51, 52, 53, 54, 55))(
        say("<image>", "<image>"), [picture()] * 2
    )
    np.testing.assert_array_equal(batch.visual_index[0], [-1, 0, 5, 6, 1, 4, 0, 7, 8, 1, 4, -1])
    np.testing.assert_array_equal(batch.tokens[0], [1, *[51, 3, 3, 52, 55] * 2, *letters("!")])


def test_tags_and_numbers_about_places():
    texts = {"image": "<a><image></a>", "video": "F{number}<a><image></a>"}
    made = processor(InternVLViews(Pixels(), 4, 1), {"image": "<image>", "video": "<image>"}, texts=texts)
    batch = made(say("<video>", "<image>"), [picture()], [[picture(value=1), picture(value=2)]])
    spelled = [1, *letters("F1"), 5, 3, 6, *letters("\nF2"), 5, 3, 6, 5, 3, 6, *letters("!")]
    np.testing.assert_array_equal(batch.tokens[0], spelled)
    np.testing.assert_allclose(batch.images[0, :, 0, 0, 0] * 255, [1, 2, 0], atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_a_text_split_at_its_pictures_has_one_beginning(split):
    batch = processor(split=split)(say("a", "<image>", "b"), [picture()])
    np.testing.assert_array_equal(batch.tokens[0], [1, *letters("a"), 3, 3, 3, *letters("b!")])


def test_lists_are_joined_for_templates_of_texts():
    batch = processor(joined="-")(say("<image>", "a", "b"), [picture()])
    np.testing.assert_array_equal(batch.tokens[0], [1, 3, 3, 3, *letters("-a-b!")])


@pytest.mark.parametrize(
    ("messages", "given", "told"),
    [
        (say("a"), 1, "has 0 image placeholders, but got 1"),
        (say("<image>"), 0, "has 1 image placeholders, but got 0"),
        (say("<image>", "<image> in a text"), 1, "has 2 image placeholders, but got 1"),
    ],
)
def test_places_and_pictures_that_differ(messages, given, told):
    for split in (False, True):
        with pytest.raises(PictureMismatch, match=f"conversation 1: its text {told}"):
            processor(split=split).batch([say("a"), messages], [[], [picture()] * given])


@pytest.mark.parametrize(
    ("messages", "images", "videos", "error", "told"),
    [
        ("hi", [], [], PromptError, "got the string 'hi'; write [{\"role\": \"user\", \"content\": 'hi'}]"),
        (say("a")[0], [], [], PromptError, "got one dict; write [message]"),
        (None, [], [], PromptError, "expected a list of messages such as"),
        ([*say("a"), "b"], [], [], PromptError, "message 1: expected a dict such as"),
        (say("<image>"), "a.png", [], PictureMismatch, "images: expected a list, got 'a.png'; write ['a.png']"),
        (say("<image>"), picture(), [], PictureMismatch, "images: expected a list, got one ndarray; write […]"),
        (say("<image>"), None, [], PictureMismatch, "images: expected a list, got None; leave it out or pass []"),
        (say("<video>"), [], "a.mp4", PictureMismatch, "videos: expected a list, got 'a.mp4'; write ['a.mp4']"),
    ],
)  # fmt: skip
def test_what_stands_without_its_list_is_named(messages, images, videos, error, told):
    call = inspect.unwrap(Processor.batch)  # without the checks of types, which are before it in tests
    with pytest.raises(error, match=f"^conversation 1: .*{re.escape(told)}"):
        call(processor(), [say("a"), messages], [[], images], [[], videos])


def test_other_numbers_of_lists_and_of_tokens():
    with pytest.raises(PictureMismatch, match="images: expected one list for each of 2 conversations, got 1"):
        processor().batch([say("a")] * 2, [[]])
    # a, three places, the head of the answer and the beginning
    assert processor(max_length=6)(say("a", "<image>"), [picture()]).tokens.shape == (1, 6)
    with pytest.raises(
        SequenceTooLong, match=r"conversation 0 is 6 tokens long, over the limit of 5.*nothing is truncated"
    ):
        processor(max_length=5)(say("a", "<image>"), [picture()])


def test_a_budget_of_visual_tokens():
    tiles = processor(InternVLViews(Pixels(), 4, 1), {"image": "<image>"})
    wide = picture(4, 12)
    assert (tiles(say("<image>"), [wide]).visual_index >= 0).sum() == 4  # three tiles and the whole
    assert (tiles(say("<image>"), [wide], max_visual_tokens=3).visual_index >= 0).sum() == 3
    with pytest.raises(InfeasibleBudget, match="takes at least 3 visual tokens, more than the 2 allowed"):
        processor()(say("<image>"), [picture()], max_visual_tokens=2)
    native = processor(NativeViews(Pixels(), PatchFormat(4, 1, 1), qwen_size, 64, 4096), {"image": "<image>"})
    with pytest.raises(InfeasibleBudget, match="conversation 0, image 0: takes at least 8 visual tokens, over 5"):
        native(say("<image>"), [picture(2, 80)], max_visual_tokens=5)


def test_a_budget_of_a_video():
    """By fewer frames where each has its place, by smaller ones where they share one."""
    frames = [picture(8, 8, value) for value in range(6)]
    tiles = processor(InternVLViews(Pixels(), 4, 2), {"video": "<video>"})
    found = tiles(say("<video>"), videos=[frames], max_video_tokens=7)
    assert (found.visual_index >= 0).sum() == 6
    np.testing.assert_allclose(found.images[0, :, 0, 0, 0] * 255, [0, 2, 3], atol=1e-5)
    native = processor(NativeViews(Pixels(), PatchFormat(4, 2, 1), qwen_size, 64, 4096), {"video": "<video>"})
    counts = [(native(say("<video>"), videos=[frames], max_video_tokens=most).visual_index >= 0).sum() for most in
              (100, 11, 3)]  # fmt: skip
    assert counts == [12, 3, 3]
    for made, least in ((tiles, 2), (native, 3)):
        with pytest.raises(
            InfeasibleBudget, match=f"conversation 0, video 0: a video.* takes at least {least} visual tokens"
        ):
            made(say("<video>"), videos=[frames], max_video_tokens=least - 1)


def test_frames_under_a_budget_keep_their_own_times():
    """Three of six frames at two a second are numbers 0, 2 and 3."""
    made = processor(InternVLViews(Pixels(), 4, 2), {"video": "<video>"}, texts={"video": "{seconds}<video>"})
    batch = made(say("<video>"), videos=[[picture(8, 8)] * 6], max_video_tokens=7)
    spelled = [token for time in ("0.0", "\n1.0", "\n1.5") for token in (*letters(time), 4, 4)]
    np.testing.assert_array_equal(batch.tokens[0], [1, *spelled, *letters("!")])


def test_an_image_whose_tiles_have_places_is_one_picture():
    """It has 2 x 3 tiles and the whole; each of 3 frames is a place of its own."""
    views, tiled = SplitViews(Pixels(), 4, 1, 12, video_edge=4), TiledText("<image>", "", "")
    made = processor(views, {"image": "<image>", "video": "<video>"}, tiled=tiled)
    load = made.example(say("<image>", "<video>"), [picture(8, 12)], [[picture()] * 3]).load
    assert (load.images, load.pictures) == (7 + 3, 1 + 3)
    for given in (1, 3):
        with pytest.raises(PictureMismatch, match=f"has {given} image placeholders, but got 2"):
            made(say("<image> What?" * given), [picture(8, 12)] * 2)


def test_the_whole_image_may_come_before_its_tiles_and_groups_are_of_places():
    """Rows of the visual table are in the order of the text, and every row has groups."""
    views = CropViews(SquareViews(Pixels(), (4, 4), 2), min_crop_size=2)
    tiled = TiledText("<image>", "", "", "a{whole}b", "c")
    made = dataclasses.replace(processor(views, {"image": "<image>"}, tiled=tiled), grouped=True)
    batch = made.batch([say("<image>"), say("x")], [[picture(4, 8)], []])
    spelled = [1, *letters("a"), 3, 3, *letters("b"), 3, 3, *letters("c"), 3, 3, *letters("!")]
    np.testing.assert_array_equal(batch.tokens[0], spelled)
    np.testing.assert_array_equal(batch.visual_index[0], [-1, -1, 0, 1, -1, 2, 3, -1, 4, 5, -1])
    groups = batch.group_ids[0]
    assert [len(set(groups[start : start + 2])) for start in (2, 5, 8)] == [1] * 3 and len(set(groups)) == 4
    assert not groups[[0, 1, 4, 7, 10]].any() and not batch.group_ids[1].any()


def test_the_model_thinks_or_not_in_all_conversations():
    """The variable of a call comes first; a template that does not read it is told before any conversation."""
    source = (
        "{{ messages[0].content }}{% if enable_thinking is defined %}{{ '+' if enable_thinking else '-' }}{% endif %}"
    )
    prompt = TemplatePrompt(ChatTemplate(source), TOKENIZER)
    made, messages = Processor(prompt, SQUARE, TOKENIZER, 2), [{"role": "user", "content": "a"}]
    assert made.thinking(None) is made
    for enable, written in ((True, "a+"), (False, "a-")):
        thinking = made.thinking(enable)
        np.testing.assert_array_equal(thinking(messages).tokens[0], [1, *letters(written)])
        assert thinking.measure(messages).length == 3
        np.testing.assert_array_equal(thinking(messages, enable_thinking=True).tokens[0], [1, *letters("a+")])
    with pytest.raises(ChatTemplateError, match="the chat template: unused variable 'enable_thinking'"):
        processor().thinking(False)


def test_every_error_names_its_sample():
    native = processor(NativeViews(Pixels(), PatchFormat(4, 1, 1), qwen_size, 64, 4096), {"image": "<image>"})
    for made, given, told in (
        (native, {"images": [[], [picture(1, 300)]]}, "conversation 1: an image of 1x300 pixels"),
        (processor(), {"images": [[], [picture()]], "max_visual_tokens": 2}, "0: an image takes at least 3"),
    ):
        with pytest.raises(ValueError, match=told):
            made.batch([say("a"), say("<image>")], **given)
    with pytest.raises(PictureMismatch, match="conversation 0, video 0: this system does not support videos"):
        processor()(say("<video>"), videos=[[picture()]])
    with pytest.raises(ChatTemplateError, match="conversation 0: the chat template: unused variable 'max_pix"):
        processor()(say("a"), max_pixels=9)
    with pytest.raises(ChatTemplateError, match="conversation 1: the chat template: expected at least one message"):
        processor().batch([say("a"), []])


def test_large_and_broken_pictures_are_named():
    with pytest.raises(
        CorruptImage, match="conversation 0, image 1: its header claims 5x4 pixels, more than max_pixels=16"
    ):
        processor(max_pixels=16)(say("<image>", "<image>"), [picture(), picture(5, 4)])
    with pytest.raises(CorruptImage, match=r"image 0: expected uint8 pixels .* got float32 \[4, 4, 3\]"):
        processor()(say("<image>"), [picture().astype(np.float32)])
    with pytest.raises(CorruptImage, match="conversation 0, image 0: UnidentifiedImageError"):
        processor()(say("<image>"), [b"no picture"])


@pytest.mark.parametrize(
    "source",
    [picture(), picture()[..., 0], picture()[..., :1], Image.fromarray(picture()), Image.new("CMYK", (4, 4))],
)
def test_every_kind_of_picture_is_taken(source):
    assert processor()(say("<image>"), [source]).images.shape == (1, 1, 4, 4, 3)


def test_a_batch_ends_together():
    batch = processor().batch([say("ab"), say("<image>", "c")], [[], [picture(value=5)]])
    np.testing.assert_array_equal(batch.segment_ids, [[0, 0, 1, 1, 1, 1], [1] * 6])
    np.testing.assert_array_equal(batch.tokens[0], [2, 2, 1, *letters("ab!")])
    np.testing.assert_array_equal(batch.positions, [[0, 0, 0, 1, 2, 3], range(6)])
    np.testing.assert_array_equal(batch.visual_index[1], [-1, 0, 1, 2, -1, -1])
    assert not batch.images[0].any()


def test_a_conversation_that_goes_on_ends_without_an_answer():
    batch = processor()(say("a"), add_generation_prompt=False)
    np.testing.assert_array_equal(batch.tokens[0], [1, *letters("a")])
    assert batch.images is None
    assert dataclasses.replace(processor(), max_pixels=1).count_visual_tokens([(9, 9), (4, 7)]) == [3, 3]


TILES = InternVLViews(Pixels(), 4, 2)
NATIVE = NativeViews(Pixels(), PatchFormat(4, 2, 2, window=2), qwen_size, 64, 4096, rotary_3d=True)
PARTS = dataclasses.replace(NATIVE, format=PatchFormat(4, 2, 2), video_limits=VolumeLimits(256, 4096), video_parts=True)
ANSWERED = {"role": "assistant", "content": "ok"}


def answered(*parts):
    return [*say(*parts), ANSWERED]


@pytest.mark.parametrize(
    ("views", "sizes", "video"),
    [
        (SQUARE, [(4, 4), (9, 3)], None),
        (TILES, [(4, 12), (8, 8)], (3, 9, 5)),
        (FixedTilesViews(Pixels(), (4, 4), 2, (1, 2), thumbnail=True), [(4, 12), (8, 8)], (3, 9, 5)),
        (NATIVE, [(40, 40), (24, 56)], (5, 24, 16)),
        (NATIVE, [], (4, 40, 40)),
        (PARTS, [], (5, 24, 16)),
        (NATIVE, [], None),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"max_visual_tokens": 8, "max_video_tokens": 18}])
def test_a_measure_is_the_load_of_the_example(views, sizes, video, limits):
    made = processor(views, {"image": "<image>", "video": "<video>"})
    messages = say(*["<image>", "a"] * len(sizes), *["<video>"] * (video is not None), "b")
    videos = [] if video is None else [[picture(*video[1:])] * video[0]]
    example = made.example(messages, [picture(*size) for size in sizes], videos, **limits)
    assert made.measure(messages, sizes, [] if video is None else [VideoSize(*video)], **limits) == example.load
    row = made.rows([[example]], targets=False)
    assert row.tokens.shape == (1, example.load.length)
    taken = 0 if row.images is None else (row.images.patches if isinstance(views, NativeViews) else row.images).shape[1]
    assert taken <= example.load.images  # several images with windows may be packed more densely
    assert (taken == example.load.images) or (views is NATIVE and len(sizes) + len(videos) > 1)


@pytest.mark.parametrize("views", [TILES, NATIVE])
def test_rows_of_any_number_of_pictures_have_one_shape(views):
    """One compiled step reads rows of 0, 1 and 3 images, and those of several examples."""
    made = processor(views, {"image": "<image>"}, rotary_3d=views is NATIVE)
    template = ChatTemplate(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}</a>{% else %}{% for c in m.content %}"
        "{% if c.type == 'text' %}{{ c.text }}{% else %}<{{ c.type }}>{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    made = dataclasses.replace(made, prompt=dataclasses.replace(made.prompt, template=template))
    none, one, three = (
        made.example(answered(*["<image>"] * count, "a"), [picture(8, 8)] * count, targets=True) for count in (0, 1, 3)
    )
    shape = RowShape(100, 48 if views is TILES else 512)
    rows = [made.rows([row], shape, targets=True) for row in ([none], [one], [three], [one, none, three], [])]
    assert len({jax.tree.structure(row) for row in rows}) == 1
    assert len({tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(row)) for row in rows}) == 1
    assert [(row.visual_index >= 0).sum() for row in rows] == [
        sum(example.visual_tokens) for example in (none, one, three)
    ] + [sum(one.visual_tokens) + sum(three.visual_tokens), 0]


def test_visual_rows_of_packed_examples_are_counted_over_the_row():
    """The learned rows are shared; those of images continue after the ones of the example before."""
    views = Ovis2Views(Pixels(), 4, 2)
    made = processor(views, num_learned=5, learned_ids=(51, 52, 53, 54, 55))
    first, second = (made.example(say("<image>"), [picture(value=value)]) for value in (10, 20))
    row = made.rows([[first, second]], RowShape(16, 3), targets=True)
    place = [-1, 0, 5, 6, 1, 4, -1]  # beginning, learned 0, two of the image, learned 1 and 4, head of the answer
    np.testing.assert_array_equal(row.visual_index[0], [*place, -1, 0, 7, 8, 1, 4, -1, -1, -1])
    np.testing.assert_array_equal(row.segment_ids[0], [1] * 7 + [2] * 7 + [0] * 2)
    np.testing.assert_array_equal(row.positions[0], [*range(7), *range(7), 0, 0])
    np.testing.assert_allclose(row.images[0, :, 0, 0, 0] * 255, [10, 20, 0], atol=1e-5)
    assert row.targets[0, 6] == 2 and not row.loss_weights.any()  # padding, not the beginning of the second


def test_packed_examples_on_three_axes_begin_again():
    made = processor(NATIVE, {"image": "<image>"}, rotary_3d=True)
    example = made.example(say("a", "<image>"), [picture(16, 16)])
    row = made.rows([[example, example]], RowShape(20, 128), targets=True)
    length = example.load.length
    np.testing.assert_array_equal(row.positions[0, :length], row.positions[0, length : 2 * length])
    np.testing.assert_array_equal(row.positions[0, 2:6], [[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]])
    np.testing.assert_array_equal(row.visual_index[0], [-1, -1, 0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7] + [-1] * 7)
    np.testing.assert_array_equal(np.unique(row.images.segment_ids), [0, 1, 2])


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (RowShape(13, 2), "sample 'x', 'y' is 14 tokens long, over the limit of 13; raise L by 1 or more"),
        (RowShape(14, 1), "sample 'x', 'y' has 2 tiles or patches, over the limit of 1; raise I by 1 or"),
    ],
)
def test_examples_that_do_not_fit_a_row_are_named(shape, told):
    made = processor()
    row = [made.example(say("aa", "<image>"), [picture()], name=name) for name in "xy"]
    assert made.rows([row], RowShape(14, 2), targets=True).tokens.shape == (1, 14)
    with pytest.raises(SequenceTooLong, match=told):
        made.rows([row], shape, targets=True, keys={"positions": "L", "tiles or patches": "I"})


def test_a_batch_takes_a_stated_shape():
    batch = processor().batch([say("ab"), say("<image>")], [[], [picture()]], shape=RowShape(9, 2))
    assert batch.tokens.shape == (2, 9) and batch.images.shape == (2, 2, 4, 4, 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shape": (9, 2)}, r"shape: expected a RowShape, got \(9, 2\)"),
        ({"name": "x"}, "name: is set by batch; remove it"),
    ],
)
def test_arguments_of_a_batch_that_are_not_its_own(monkeypatch, options, told):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(PromptError, match=told):
        processor().batch([say("ab")], **options)


def test_what_is_no_video_is_named():
    made = processor(InternVLViews(Pixels(), 4, 1), {"video": "<video>"})
    with pytest.raises(
        CorruptImage, match="conversation 0, video 0: expected a file or a sequence of frames, got a int"
    ):
        made([{"role": "user", "content": [{"type": "video", "video": 3}]}])
