"""Chat templates, conversations and answers."""

import functools
import random
from typing import Any

import numpy as np

from tests.fuzz.media import pictures, videos
from tests.fuzz.mutation import TEXTS, VALUES, changed_json, changed_text
from tests.fuzz.target import Target
from tests.processors.test_processor import processor
from vlm_jax.processors import templates
from vlm_jax.processors.boxes import parse_boxes
from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.grounding import answer_boxes, document_blocks, draw_boxes
from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.learned import PromptError
from vlm_jax.processors.list_format import ListFormatError, to_list_format
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiles import InternVLViews, Ovis2Views
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.processors.video import RateSampler
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import PatchFormat

EXPRESSIONS = (
    "x",
    "messages",
    "messages[0]",
    "messages[0].content",
    "loop",
    "ns",
    "ns.t",
    "range(99999)",
    "range(9)",
    "[]",
    "{}",
    "()",
    "'a'",
    "''",
    "1",
    "-1",
    "0",
    "10**9",
    "2**31",
    "1.5",
    "none",
    "true",
    "missing",
    "'%s'",
    "'{}'",
    "[1, 'a', [2]]",
)
OPERATIONS = (
    "{0} + {1}",
    "{0} * {1}",
    "{0} ** {1}",
    "{0} / {1}",
    "{0} // {1}",
    "{0} % {1}",
    "{0} ~ {1}",
    "{0} in {1}",
    "{0} == {1}",
    "[{0}, {1}]",
    "({0}, {0})",
    "{{'k': {0}}}",
    "{0}[{1}]",
    "{0}[:2]",
    "{0}.__class__",
    "{0}['__class__']",
    "{0}()",
    "{0} | list",
    "{0} | length",
    "{0} | join({1})",
    "{0} | tojson(indent={1})",
    "{0} | center({1})",
    "{0} | replace({1}, {0})",
    "{0} | indent({1})",
    "{0} | batch({1}) | list",
    "{0} | map('upper') | list",
    "{0} | select('eq', {1}) | list",
    "{0} | sum",
    "{0} | sort",
    "{0} | string",
    "{0} | attr('__init__')",
    "{0} | format({1})",
    "{0} | round({1})",
    "{0} | int",
    "{0} | trim",
    "{0}.format({1})",
    "{0}.ljust({1})",
    "{0}.zfill({1})",
    "{0}.join({1})",
    "{0}.replace({0}, {1})",
    "{0}.split({1})",
    "{0}.items()",
    "{0}.get({1})",
    "dict(a={0}, b={0})",
    "namespace(t={0})",
    "cycler({0}, {0})",
    "raise_exception({0})",
    "strftime_now({0})",
    "m({0})",
    "{0} if {1} else {0}",
    "{0} | {1}",
    "{0} | groupby({1}) | list",
    "{0} | unique | list",
)
STATEMENTS = (
    "{{{{ {0} }}}}",
    "{{% for x in {0} %}}{2}{{% endfor %}}",
    "{{% set ns.t = {0} %}}",
    "{{% if {0} %}}{2}{{% endif %}}",
    "{{% set ns = namespace(t={0}) %}}",
    "{{% macro m(x) %}}{2}{{% endmacro %}}",
    "{{% set x %}}{2}{{% endset %}}",
    "{2}{2}",
    "{{% generation %}}{2}{{% endgeneration %}}",
    "{{% for x in {0} recursive %}}{2}{{{{ loop({1}) }}}}{{% endfor %}}",
    "text",
    "{{% include {0} %}}",
    "{{% break %}}",
    "{{% filter upper %}}{2}{{% endfilter %}}",
    "{{% call m({0}) %}}{2}{{% endcall %}}",
)


def _expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(EXPRESSIONS)
    return "(" + rng.choice(OPERATIONS).format(_expression(rng, depth - 1), _expression(rng, depth - 1)) + ")"


def _statement(rng: random.Random, depth: int) -> str:
    body = "" if depth == 0 else _statement(rng, depth - 1)
    return rng.choice(STATEMENTS).format(_expression(rng, 3), _expression(rng, 2), body)


def _template(rng: random.Random) -> str:
    if rng.random() < 0.3:
        usual = (templates.VICUNA, templates.LLAMA2, templates.DEEPSEEK, templates.MPT, templates.OVIS2_5)
        return changed_text(rng, rng.choice(usual), (*TEXTS, *EXPRESSIONS, "%}", "{%", "endfor", "__class__"))
    head = "{% set ns = namespace(t='a') %}{% macro m(x) %}{{ x }}{% endmacro %}" if rng.random() < 0.7 else ""
    return head + "".join(_statement(rng, rng.randint(0, 4)) for _ in range(rng.randint(1, 4)))


def _render(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    text = ChatTemplate(source, {"bos_token": "<s>"}).render(messages)
    assert ("<class" not in text and "<bound method" not in text and "<built-in" not in text) or "__class__" in source


ANSWERS = (
    "<ref>a</ref><box>(1,2),(3,4)</box>",
    "<|box_start|>(1,2),(3,4)<|box_end|>",
    "<box>[[1, 2, 3, 4]]</box>",
    "<quad>(1,2)</quad>",
    '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]',
    '<p class="x" data-bbox="1 2 3 4">a &amp; b</p>',
    "<img>a.png</img>",
    "```json\n",
    "<table><tr><td data-bbox='1 2 3 4'>a</td></tr></table>",
    "<!-- a -->",
    "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>",
)
PIECES = (
    *TEXTS,
    *ANSWERS,
    "<box>",
    "</box>",
    "<ref>",
    "</ref>",
    "(1,2)",
    "(1e9,2)",
    "[[",
    "{",
    "<a ",
    "<![x[",
    "</",
    "<!--",
    "&#",
    "<img>",
    "<p data-bbox='",
    '"',
    "\u0301\u0316" * 9,
)


def _answer(rng: random.Random) -> str:
    text = "".join(rng.choices(ANSWERS if rng.random() < 0.5 else PIECES, k=rng.randint(1, 6)))
    if rng.random() < 0.1:
        text += rng.choice(PIECES) * rng.choice((100, 5000))
    return changed_text(rng, text, PIECES)


def _read_answer(text: str) -> None:
    boxes = answer_boxes(text, (40, 60), (10, 10))
    draw_boxes(pillow(), [box for box in boxes if len(box.name or "") < 1000][:100])
    document_blocks(text, (40, 60))
    assert all(0 <= value < 1000 for box in parse_boxes(text) for value in box)
    to_list_format(text)


@functools.cache
def pillow() -> Any:
    """A picture."""
    from PIL import Image

    return Image.new("RGB", (60, 40))


@functools.cache
def processors() -> tuple[Processor, ...]:
    """Of all kinds of views."""
    return (
        processor(),
        processor(SquareViews(Pixels(), (8, 8), 4, "crop")),
        processor(SquareViews(Pixels(resizes_as="torch"), (8, 8), 4, "pad")),
        processor(Ovis2Views(Pixels(), 4, 2), num_learned=5, learned_ids=(51, 52, 53, 54, 55)),
        processor(InternVLViews(Pixels(), 4, 1), {"video": "<video>", "image": "<image>"}, frame_sampler=RateSampler()),
        processor(NativeViews(Pixels(), PatchFormat(4, 2, 2), qwen_size, 64, 4096, rotary_3d=True), rotary_3d=True),
    )


def _media(rng: random.Random) -> Any:
    sizes = ((4, 4), (1, 1), (1, 9000), (9000, 1), (0, 3), (37, 5))
    height, width = rng.choice(sizes)
    given = (
        np.zeros((height, width, 3), np.uint8),
        np.zeros((height, width), np.float32),
        rng.choice(VALUES),
        pillow(),
    )
    return rng.choice((*given, rng.choice(pictures()), rng.choice(videos()), "/nowhere.png", "/dev/zero", "/"))


def _conversation(rng: random.Random) -> tuple[int, Any, Any, Any, dict[str, Any]]:
    turns = []
    for number in range(rng.randint(1, 4)):
        parts = [
            rng.choice(
                (
                    {"type": "text", "text": rng.choice(TEXTS)},
                    {"type": "image"},
                    {"type": "image", "image": _media(rng)},
                    {"type": "video"},
                    {"type": "video", "video": _media(rng)},
                )
            )
            for _ in range(rng.randint(0, 3))
        ]
        role = ("user", "assistant")[number % 2] if rng.random() < 0.8 else rng.choice(("system", "tool", "", "User"))
        turns.append({"role": role, "content": rng.choice((parts, parts, rng.choice(TEXTS)))})
    messages = changed_json(rng, turns, 2) if rng.random() < 0.5 else turns
    beside = [None if rng.random() < 0.5 else [_media(rng) for _ in range(rng.randint(0, 3))] for _ in range(2)]
    options = {"targets": True} if rng.random() < 0.3 else {}
    return rng.randrange(len(processors())), messages, beside[0], beside[1], options


def _prepare(given: tuple[int, Any, Any, Any, dict[str, Any]]) -> None:
    number, messages, images, videos_beside, options = given
    batch = processors()[number](messages, images or (), videos_beside or (), **options)
    assert batch.tokens.shape == batch.visual_index.shape


TARGETS = {
    "templates": Target(_template, _render, (ChatTemplateError,)),
    "answers": Target(_answer, _read_answer, (ListFormatError,)),
    "conversations": Target(
        _conversation,
        _prepare,
        (
            ChatTemplateError,
            CorruptImage,
            FileNotFoundError,
            PictureMismatch,
            PromptError,
            SequenceTooLong,
            TokenizerError,
        ),
    ),
}
