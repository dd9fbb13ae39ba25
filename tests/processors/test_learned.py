"""What is learned of a conversation; texts are written by hand, as releases write them."""

import numpy as np
import pytest

from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.layout import Text
from vlm_jax.processors.learned import Span, encode_learned, render_learned
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.spelled_prompt import DeepSeekVL2Prompt, PromptError, QwenVLPrompt
from vlm_jax.processors.templates import DEEPSEEK, INTERNVL, OVIS2, OVIS2_5_TRAINING, VICUNA
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.processors.vocabulary import SentencePieceVocabulary

from .test_processor import SQUARE, picture
from .test_spelled_prompt import TOKENIZER, spelled
from .vocabularies import sentencepiece_model

TURNS = [
    {"role": "user", "content": "<image>\nWhat?"},
    {"role": "assistant", "content": "A cat.\n"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def learned(pieces):
    return spelled([piece for piece in pieces if isinstance(piece, Text) and piece.learned])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (VICUNA, [" A cat.\n</s>", " Yes.</s>"]),
        (DEEPSEEK, [" A cat.</s>", " Yes.</s>"]),
        (INTERNVL["Hermes-2"], ["A cat.\n<|im_end|>", "Yes.<|im_end|>"]),
        (INTERNVL["internvl2_5"], ["A cat.\n<|im_end|>", "Yes.<|im_end|>"]),
        (OVIS2, ["A cat.\n<|im_end|>", "Yes.<|im_end|>"]),
        (OVIS2_5_TRAINING, ["A cat.\n<|im_end|>", "Yes.<|im_end|>"]),
        # An answer that no token ends is learned with what the template writes after it.
        ("{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant:"
         "{% endif %}", ["A cat.\n ", "Yes. "]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", [True, False])
def test_templates_of_releases(template, said, split):
    template = ChatTemplate(template, TOKENIZER.names)
    text, spans = render_learned(template, TURNS, TOKENIZER, add_generation_prompt=False)
    assert text == template.render(TURNS, add_generation_prompt=False)
    assert [text[start:stop] for start, stop, _ in spans] == said
    marks = {"image": "<image>"}
    pieces = TemplatePrompt(template, TOKENIZER, marks, marks, split=split)(
        TURNS, (), add_generation_prompt=False, targets=True
    )
    assert learned(pieces) == "".join(said) and "[image]" in spelled(pieces)


def test_turns_that_are_spelled_one_by_one():
    turns = [{"role": "system", "content": "S"}, *TURNS]
    assert learned(QwenVLPrompt(TOKENIZER)(turns, (), targets=True)) == "A cat.\n<|im_end|>Yes.<|im_end|>"
    assert learned(DeepSeekVL2Prompt(TOKENIZER)(turns, (), targets=True)) == "A cat.</s>Yes.</s>"
    assert learned(QwenVLPrompt(TOKENIZER)(turns, ())) == learned(DeepSeekVL2Prompt(TOKENIZER)(turns, ())) == ""


def test_a_thought_is_learned_and_an_empty_one_that_is_put_in_is_not():
    thinks = [*TURNS[:3], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}]
    text, spans = render_learned(ChatTemplate(OVIS2_5_TRAINING), thinks, TOKENIZER, add_generation_prompt=False)
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\nA cat.\n<|im_end|>\n" in text
    assert [text[start:stop] for start, stop, _ in spans] == ["A cat.\n<|im_end|>", thinks[3]["content"] + "<|im_end|>"]


def processor():
    marks = {"image": "<image>"}
    return Processor(TemplatePrompt(ChatTemplate(OVIS2), TOKENIZER, marks, marks), SQUARE, TOKENIZER, 0)


def test_a_batch_of_targets():
    """A row says at each place what comes next, and where an assistant says it; it ends without another answer."""
    batch = processor().batch([TURNS[:2], TURNS], [[picture()], [picture()]], targets=True)
    whole = processor().batch([TURNS], [[picture()]], add_generation_prompt=False)
    np.testing.assert_array_equal(batch.tokens[1], whole.tokens[0])
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert whole.targets is None and whole.loss_weights is None
    decode = TOKENIZER.vocabulary.decode
    said = [decode(row[weights > 0].tolist()) for row, weights in zip(batch.targets, batch.loss_weights, strict=True)]
    assert said == ["A cat.\n<|im_end|>", "A cat.\n<|im_end|>Yes.<|im_end|>"]
    length = int(batch.segment_ids[0].sum())
    assert batch.segment_ids[0, :length].all() and not batch.loss_weights[0, length - 1 :].any()


def test_what_cannot_be_learned_names_its_sample():
    with pytest.raises(PromptError, match="conversation 1: expected at least one assistant message"):
        processor().batch([TURNS[2:], TURNS[2:3]], targets=True)
    last = "{% for m in messages %}{{ m.role }}:{% if loop.last %}hm {% endif %}{{ m.content }}{% endfor %}"
    made = Processor(TemplatePrompt(ChatTemplate(last), TOKENIZER), SQUARE, TOKENIZER, 0)
    with pytest.raises(
        ChatTemplateError, match="conversation 0: the chat template: message 1: cannot find its trained"
    ):
        made(TURNS, targets=True)


def test_a_token_across_an_end_is_learned_or_refused():
    tokenizer = Tokenizer(SentencePieceVocabulary(sentencepiece_model(), {}, bos=None, eos=None))
    text = "hello the dog"
    ids, marked = encode_learned(tokenizer, text, [Span(len("hello"), len(text))], add_special=False)
    assert tokenizer.decode([index for index, each in zip(ids, marked, strict=True) if each]) == "the dog"
    assert tokenizer.decode([index for index, each in zip(ids, marked, strict=True) if not each]) == "hello"
    with pytest.raises(TokenizerError, match=r"a token crosses the start or end of trained text, at 'hello th' \| 'e"):
        encode_learned(tokenizer, text, [Span(len("hello th"), len(text))], add_special=False)
