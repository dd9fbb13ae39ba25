"""What messages on conversations advise works: a call that fails, the message, and what the corrected call lays out."""

import inspect

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.spelled_prompt import DeepSeekVL2Prompt, PromptError, QwenVLPrompt
from vlm_jax.processors.video import FrameSettings, MiddleSampler, SecondSampler, SegmentSampler
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import PatchFormat

from ..advice import tried
from .letters import TOKENIZER
from .test_learned import TURNS
from .test_learned import processor as learning
from .test_processor import SQUARE, picture, processor, say
from .test_spelled_prompt import TOKENIZER as SPELLING

MARKED = {"image": "<image>", "video": "<video>"}
PLAIN = processor()  # 3 tokens an image
NATIVE = processor(NativeViews(Pixels(), PatchFormat(4, 2, 1), qwen_size, 64, 4096), MARKED)  # one a patch of 4x4
SPELLED = Processor(QwenVLPrompt(SPELLING), SQUARE, SPELLING, 2)
TURN_BY_TURN = Processor(DeepSeekVL2Prompt(SPELLING), SQUARE, SPELLING, 2)
FRAMES = [picture(8, 8, value) for value in range(4)]
ONE, TEXT = {"type": "image"}, {"type": "text", "text": "a"}
PIXELS = {"min_pixels": 64, "max_pixels": 64}
SIDES = {"resized_height": 8, "resized_width": 8}
WHOLE = {"image": picture()}


def user(*items):
    return [{"role": "user", "content": list(items)}]


def of(messages, images=(), videos=(), **options):
    """A call of a processor."""
    return messages, images, videos, options


# (processor, call, message, corrected call, its visual tokens)
FIXES = [
    (
        PLAIN,
        of("hi"),
        tried("expected a list of messages, got {the string 'hi'}; write [{}]"),
        of([{"role": "user", "content": "hi"}]),
        0,
    ),
    (
        PLAIN,
        of(say("hi")[0]),
        tried("expected a list of messages such as {}, got {one dict}; write [message]"),
        of([say("hi")[0]]),
        0,
    ),
    (
        PLAIN,
        of([{"role": "user", "content": TEXT}]),
        tried("content: expected a text or a list of items, got {a value of type dict}; write [item]"),
        of([{"role": "user", "content": [TEXT]}]),
        0,
    ),
    (PLAIN, of(say("<image>"), picture()), tried("write […]"), of(say("<image>"), [picture()]), 3),
    (PLAIN, of(say("a"), None), tried("leave it out or pass []"), of(say("a")), 0),
    (PLAIN, of(say("a"), None), tried("leave it out or pass []"), of(say("a"), []), 0),
    (
        PLAIN,
        of(user({**ONE, **WHOLE}), [picture()]),
        tried("{image}s are given both in its messages and separately; pass them in one of the two"),
        of(user({**ONE, **WHOLE})),
        3,
    ),
    (
        PLAIN,
        of(user({**ONE, **WHOLE}), [picture()]),
        tried("{image}s are given both in its messages and separately; pass them in one of the two"),
        of(user(ONE), [picture()]),
        3,
    ),
    (
        NATIVE,
        of(user({**ONE, **PIXELS}, {**TEXT, "text": "<image>"}), [picture(8, 8)] * 2),
        tried("there are {1} items for {2} {image}s; pass one item for every {image}"),
        of(user({**ONE, **PIXELS}, ONE), [picture(8, 8)] * 2),
        8,
    ),
    (
        PLAIN,
        of(say("a"), [picture()]),
        tried(
            'has {0} {image} placeholders, but got {1}; pass one {{"type": "{image}"}} item in the messages for every'
        ),
        of(user(ONE, TEXT), [picture()]),
        3,
    ),
    (PLAIN, of(say("a"), name="x"), tried("name: is set by batch; remove it"), of(say("a")), 0),
    (
        processor(max_length=5),
        of(say("a", "<image>"), [picture()]),
        tried("is {6} tokens long, over the limit of {5}; shorten it or pass fewer or smaller images"),
        of(say("<image>"), [picture()]),
        3,
    ),
    (
        processor(max_length=5),
        of(say("a", "<image>"), [picture()]),
        tried("is {6} tokens long, over the limit of {5}; shorten it or pass fewer or smaller images"),
        of(say("a")),
        0,
    ),
    (
        NATIVE,
        of(user({"type": "video", "nframes": 2}), (), [FRAMES]),
        tried("a video that is given as frames takes only fps; remove its other settings"),
        of(user({"type": "video", "fps": 2}), (), [FRAMES]),
        8,
    ),
    (
        PLAIN,
        of(say("<video>"), (), [FRAMES[:2]]),
        tried("this system does not support videos; pass single frames as images"),
        of(say("<image>", "<image>"), FRAMES[:2]),
        6,
    ),
    (
        NATIVE,
        of(user({**ONE, **SIDES, **PIXELS}), [picture(9, 9)]),
        tried("resized_height and resized_width exclude min_pixels and max_pixels; pass one pair"),
        of(user({**ONE, **SIDES}), [picture(9, 9)]),
        4,
    ),
    (
        NATIVE,
        of(user({**ONE, **SIDES, **PIXELS}), [picture(9, 9)]),
        tried("resized_height and resized_width exclude min_pixels and max_pixels; pass one pair"),
        of(user({**ONE, **PIXELS}), [picture(9, 9)]),
        4,
    ),
    (
        PLAIN,
        of(user({**ONE, "max_pixels": 64}), [picture()]),
        tried("{max_pixels}: this system's images have fixed sizes; remove the key from the item"),
        of(user(ONE), [picture()]),
        3,
    ),
    (
        NATIVE,
        of(user({"type": "video", "nframes": 2, "fps": 1}), (), [FRAMES]),
        tried("nframes excludes {fps}; pass one of the two"),
        of(user({"type": "video", "fps": 1}), (), [FRAMES]),
        8,
    ),
    (
        SPELLED,
        of([{"role": "user", "content": "<img>abcd</img>"}], [picture()]),
        tried("the name of an image has {4} bytes, more than its {3} visual tokens; rename the file"),
        of([{"role": "user", "content": "<img>abc</img>"}], [picture()]),
        3,
    ),
    (
        TURN_BY_TURN,
        of([{"role": "user", "content": "a", "tools": []}]),
        tried("message {0}: the key '{tools}' is not read by this model's prompt; remove it"),
        of([{"role": "user", "content": "a"}]),
        0,
    ),
    (
        PLAIN,
        of([{"role": "user", "content": "a", "images": []}]),
        tried("message {0}: the template does not read the key '{images}'; remove it"),
        of([{"role": "user", "content": "a"}]),
        0,
    ),
]


def tokens_of(made, given):
    """Visual tokens of a call, without the checks of types, which are before it in tests."""
    messages, images, videos, options = given
    batch = inspect.unwrap(Processor.batch)(made, [messages], [images], [videos], **options)
    return 0 if batch.visual_index is None else int((np.asarray(batch.visual_index) >= 0).sum())


@pytest.mark.parametrize(("made", "fault", "message", "fix", "num_tokens"), FIXES)
def test_advice_that_is_followed_helps(made, fault, message, fix, num_tokens):
    with pytest.raises((PromptError, PictureMismatch, SequenceTooLong, ChatTemplateError), match=message):
        tokens_of(made, fault)
    assert tokens_of(made, fix) == num_tokens


@pytest.fixture
def path(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_one_path_is_written_as_a_list(path):
    with pytest.raises(PictureMismatch, match="images: expected a list, got .*; " + tried("write [{}]")):
        tokens_of(PLAIN, of(say("<image>"), path))
    assert tokens_of(PLAIN, of(say("<image>"), [path])) == 3


def test_a_detail_that_is_not_read_is_removed(path):
    with pytest.raises(PromptError, match=tried("{image_url}.{detail} is not read; remove it")):
        tokens_of(PLAIN, of(user({"type": "image_url", "image_url": {"url": path, "detail": "low"}})))
    assert tokens_of(PLAIN, of(user({"type": "image_url", "image_url": {"url": path}}))) == 3


@pytest.mark.parametrize("key", ["loss", "weight"])
def test_only_what_an_assistant_says_has_a_weight(key):
    marked = [{**TURNS[0], key: True if key == "loss" else 1.0}, *TURNS[1:]]
    with pytest.raises(PromptError, match=tried("and this one has the role {'user'}; remove the key")):
        learning().batch([marked], [[picture()]], targets=True)
    assert learning().batch([TURNS], [[picture()]], targets=True).loss_weights.any()


def test_a_template_whose_texts_depend_on_the_answer_marks_what_is_learned():
    last = "{% for m in messages %}{{ m.role ~ messages[-1].content | length }}{{ m.content }}{% endfor %}"
    said = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    shown = last.replace("{{ m.content }}", said + "{% endif %}")

    def batch(source):
        made = Processor(TemplatePrompt(ChatTemplate(source), TOKENIZER), SQUARE, TOKENIZER, 0)
        return made([{"role": "user", "content": "a"}, {"role": "assistant", "content": "ok"}], targets=True)

    advised = tried("or without the generation prompt; put {{% generation %}} and {{% endgeneration %}} around the")
    with pytest.raises(ChatTemplateError, match=advised):
        batch(last)
    found = batch(shown)
    assert TOKENIZER.decode(found.targets[found.loss_weights > 0]) == "ok"


def test_samplers_say_which_settings_they_take():
    with pytest.raises(
        PictureMismatch, match=tried("{fps}: this system samples a number of frames; set nframes instead")
    ):
        SegmentSampler(4).following(FrameSettings(fps=1))
    assert SegmentSampler(4).following(FrameSettings(nframes=2)).chosen(9, 1).tolist() == [2, 6]
    with pytest.raises(PictureMismatch, match=tried("samples a frame a second; set max_frames instead")):
        SecondSampler(4).following(FrameSettings(nframes=2))
    assert SecondSampler(4).following(FrameSettings(max_frames=2)).chosen(12, 3).tolist() == [0, 11]
    with pytest.raises(PictureMismatch, match=tried("samples a number of frames; set nframes or fps instead")):
        MiddleSampler(4).following(FrameSettings(min_frames=2))
    assert MiddleSampler(4).following(FrameSettings(nframes=2)).chosen(8, 1).tolist() == [2, 6]
    assert MiddleSampler(4).following(FrameSettings(fps=1)).chosen(4, 2).tolist() == [1, 3]
