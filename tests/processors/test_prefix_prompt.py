"""Prompts of a prefix and an answer: pieces, and what is refused; ids are compared in tests/parity."""

import numpy as np
import pytest

from vlm_jax.processors.learned import PromptError
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.prefix_prompt import PrefixPrompt
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer

from ..advice import tried
from .letters import Letters

BOS, EOS, IMAGE = 1, 6, 3
TOKENIZER = Tokenizer(Letters(), {"bos_token": "<s>", "eos_token": "</a>", "pad_token": "<pad>"})
PROCESSOR = Processor(PrefixPrompt(TOKENIZER), SquareViews(Pixels(), (4, 4), 2), TOKENIZER, 2, grouped=True)
PICTURE = np.zeros((4, 4, 3), np.uint8)


def letters(text):
    return Letters().encode(text, False)


def user(*items):
    return {"role": "user", "content": [{"type": "image"} if item is None else _text(item) for item in items]}


def _text(text):
    return {"type": "text", "text": text}


def test_the_prefix_of_every_example_is_a_group():
    """Two examples in one row, of one and of no image."""
    one = PROCESSOR.example([user(None, "a"), {"role": "assistant", "content": "bc"}], [PICTURE], targets=True)
    two = PROCESSOR.example([user("d"), {"role": "assistant", "content": "e", "weight": 0.5}], targets=True)
    row = PROCESSOR.rows([[one, two]], targets=True)
    first, second = [IMAGE, IMAGE, BOS, *letters("a\n"), *letters("bc"), EOS], [BOS, *letters("d\ne"), EOS]
    np.testing.assert_array_equal(row.tokens, [[*first, *second]])
    np.testing.assert_array_equal(row.group_ids, [[1] * 5 + [0] * 3 + [1] * 3 + [0] * 2])
    np.testing.assert_array_equal(row.segment_ids, [[1] * 8 + [2] * 5])
    np.testing.assert_array_equal(row.loss_weights, [[0] * 4 + [1] * 3 + [0] * 3 + [0.5] * 2 + [0]])


def test_the_start_is_after_the_last_image():
    batch = PROCESSOR([user("a", None, "b", None, "c")], [PICTURE] * 2)
    expected = [*letters("a"), IMAGE, IMAGE, *letters("b"), IMAGE, IMAGE, BOS, *letters("c\n")]
    np.testing.assert_array_equal(batch.tokens, [expected])
    assert batch.group_ids.all()
    same = PROCESSOR([{"role": "user", "content": "a<image>b<image>c"}], [PICTURE] * 2)
    np.testing.assert_array_equal(same.tokens, batch.tokens)


def test_a_continuation_is_behind_the_prefix():
    batch = PROCESSOR.batch([[user("a")]], continuations=["b"])
    np.testing.assert_array_equal(batch.tokens, [[BOS, *letters("a\nb")]])
    np.testing.assert_array_equal(batch.group_ids, [[1, 1, 1, 0]])
    np.testing.assert_array_equal(batch.loss_weights, [[0, 0, 1, 0]])


def test_images_belong_in_the_question():
    told = tried(
        "expected an answer without images, got {} ('{}' in a text is an image too); put images in the question"
    )
    asked = user(None, "a")
    for content in ("b<image>c", [_text("b"), {"type": "image"}]):
        shown = [PICTURE] * (1 if isinstance(content, str) else 2)
        with pytest.raises(PromptError, match=told):
            PROCESSOR.example([asked, {"role": "assistant", "content": content}], shown, targets=True)
    assert PROCESSOR.example(
        [user(None, None, "a"), {"role": "assistant", "content": "b"}], [PICTURE] * 2, targets=True
    )


def test_a_conversation_is_one_question():
    answer = {"role": "assistant", "content": "b"}
    with pytest.raises(PromptError, match=tried("got {}; make a conversation of each question")):
        PROCESSOR.batch([[user("a"), answer, user("c")]])
    assert PROCESSOR.batch([[user("a"), answer], [user("c")]]).tokens.shape == (2, 5)
    for messages in ([answer], [{"role": "system", "content": "x"}, user("a")]):
        with pytest.raises(PromptError, match="the model takes one question, with one answer in training"):
            PROCESSOR(messages)
    with pytest.raises(PromptError, match=tried("without a chat template, {} are unused; leave them out")):
        PROCESSOR([user("a")], enable_thinking=True)
    assert PROCESSOR([user("a")]).tokens.shape == (1, 3)
