"""What is learned of a conversation; texts are written by hand, as releases write them."""

import numpy as np
import pytest

from vlm_jax.processors.as_released import Vicuna
from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.layout import Text
from vlm_jax.processors.learned import Learned, Span, encode_learned, render_learned
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.spelled_prompt import DeepSeekVL2Prompt, PromptError, QwenVLPrompt
from vlm_jax.processors.templates import DEEPSEEK, INTERNVL, OVIS2, OVIS2_5_TRAINING, VICUNA
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.processors.vocabulary import SentencePieceVocabulary

from ..advice import tried
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
    tags = "<|im_start|><|im_end|>\n"  # of every turn, also of the system
    answers = ["<|im_start|>A cat.\n<|im_end|>\n", "<|im_start|>Yes.<|im_end|>\n"]
    assert learned(QwenVLPrompt(TOKENIZER)(turns, (), targets=True)) == tags * 2 + answers[0] + tags + answers[1]
    assert learned(QwenVLPrompt(TOKENIZER)(turns, (), targets=True, turns="last")) == answers[1]
    assert learned(DeepSeekVL2Prompt(TOKENIZER)(turns, (), targets=True)) == "A cat.</s>Yes.</s>"
    assert learned(QwenVLPrompt(TOKENIZER)(turns, ())) == learned(DeepSeekVL2Prompt(TOKENIZER)(turns, ())) == ""


# LLaVA's official template in the format of transformers, which has no end token.
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "BEGIN{{ content['text'] + ' '}}END{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BLOCKS = (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ content['text'] + ' '}}{% endif %}"
)


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_an_end_token_is_appended_where_the_template_writes_none(blocks, listed):
    """Strings and lists alike; the space that the template writes behind the last answer is not learned."""
    source = LLAVA_HF.replace("BEGIN{{ content['text'] + ' '}}END", BLOCKS if blocks else "{{ content['text'] + ' '}}")
    turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS] if listed else TURNS
    text, spans = render_learned(ChatTemplate(source), turns, TOKENIZER, add_generation_prompt=False)
    assert text == "USER: <image>\nWhat? ASSISTANT: A cat.\n USER: Sure? ASSISTANT: Yes.</s>"
    space = "" if blocks else " "
    assert [text[start:stop] for start, stop, _ in spans] == [f"{space}A cat.\n ", f"{space}Yes.</s>"]
    asked, spans = render_learned(ChatTemplate(source), turns[:3], TOKENIZER, add_generation_prompt=False)
    assert asked == text.removesuffix(" ASSISTANT: Yes.</s>") + " " and len(spans) == 1


def test_what_a_family_learns_besides_answers():
    """Written by hand: the newline behind the end token, tags of all turns, and heads of answers."""

    def made(learned_of_family, template=OVIS2, **options):
        marks = {"image": "<image>"}
        prompt = TemplatePrompt(ChatTemplate(template), TOKENIZER, marks, marks, learned=learned_of_family)
        return learned(prompt(TURNS, (), add_generation_prompt=False, targets=True, **options))

    assert made(Learned(end="<|im_end|>\n")) == "A cat.\n<|im_end|>\nYes.<|im_end|>\n"
    assert made(Learned(end="</s>")) == "A cat.\n<|im_end|>Yes.<|im_end|>"
    head = "<|im_start|>assistant\n"
    assert made(Learned(head=True)) == f"{head}A cat.\n<|im_end|>{head}Yes.<|im_end|>"
    tags = made(Learned(tokens=("<|im_end|>",)))
    assert tags == "<|im_end|>" * 2 + "A cat.\n<|im_end|>" + "<|im_end|>" + "Yes.<|im_end|>"
    assert made(Learned(tokens=("<|im_end|>",)), turns="last") == "Yes.<|im_end|>"


@pytest.mark.parametrize("split", [True, False])
def test_images_are_first_in_training_as_in_the_release(split):
    marks = {"image": "<image>"}

    def text(content, first):
        prompt = TemplatePrompt(
            ChatTemplate(VICUNA, TOKENIZER.names), TOKENIZER, marks, marks, split=split, joined="\n",
            learned=Learned(images_first=first),
        )  # fmt: skip
        turns = [{"role": "user", "content": content}, TURNS[1]]
        found = spelled(prompt(turns, (), add_generation_prompt=False, targets=True))
        return found[found.index("USER: ") : found.index("ASSISTANT:")]

    image, words = {"type": "image"}, {"type": "text", "text": " What? "}
    for content in ("What? <image>", [words, image]):
        assert text(content, "always") == text(content, "single") == "USER: [image]\nWhat? "
    for content in ("What? <image>\n<image>", [words, image, image]):
        assert text(content, "always") == "USER: [image]\n[image]\nWhat? "
        assert text(content, "single") == text(content, "never") != text(content, "always")


def test_weights_of_turns():
    """All answers, the last one, and those that messages say themselves."""

    def weights(first, second, turns="all"):
        messages = [TURNS[0], {**TURNS[1], **first}, TURNS[2], {**TURNS[3], **second}]
        batch = processor().batch([messages], [[picture()]], targets=True, turns=turns)
        row, ids = batch.loss_weights[0], batch.targets[0]
        said = TOKENIZER.vocabulary.decode(ids[row > 0].tolist())
        return said, sorted(set(row.tolist()) - {0.0})

    both, last = "A cat.\n<|im_end|>Yes.<|im_end|>", "Yes.<|im_end|>"
    assert weights({}, {}) == (both, [1.0])
    assert weights({}, {}, "last") == weights({"loss": False}, {}) == (last, [1.0])
    assert weights({"weight": 0}, {"weight": 0.25}) == (last, [0.25])
    assert weights({"weight": 2}, {"weight": 0.5}) == (both, [0.5, 2.0])
    assert weights({"loss": True}, {}, "last") == (both, [1.0])
    assert weights({"weight": 0.5}, {}, "last") == (both, [0.5, 1.0])


@pytest.mark.parametrize("blocks", [True, False])
def test_weights_of_turns_in_blocks(blocks):
    said = "{{ m.content + '<|im_end|>' }}"
    said = "{% generation %}" + said + "{% endgeneration %}" if blocks else said
    source = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}SAID{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ).replace("SAID", said)
    turns = [TURNS[0], {**TURNS[1], "weight": 0.5}, *TURNS[2:]]
    text, spans = render_learned(ChatTemplate(source), turns, TOKENIZER, add_generation_prompt=False)
    found = [(text[start:stop], weight) for start, stop, weight in spans]
    assert found == [("A cat.\n<|im_end|>", 0.5), ("Yes.<|im_end|>", 1.0)]


@pytest.mark.parametrize(
    ("number", "keys", "message"),
    [
        (1, {"loss": "no"}, "conversation 0: message 1: loss: expected true or false, got 'no'"),
        (1, {"weight": -1}, "message 1: weight: expected a finite number of at least 0, got -1"),
        (3, {"weight": float("nan")}, "message 3: weight: expected a finite number of at least 0, got nan"),
        (3, {"weight": True}, "message 3: weight: expected a finite number of at least 0, got True"),
        (
            0,
            {"loss": True},
            "message 0: loss: only an assistant's message is learned, and this one has the role 'user'",
        ),
        (2, {"weight": 1.0}, "message 2: weight: only an assistant's message is learned"),
    ],
)
def test_bad_weights_are_refused_by_name(number, keys, message):
    messages = [{**turn, **keys} if place == number else turn for place, turn in enumerate(TURNS)]
    with pytest.raises(PromptError, match=message):
        processor().batch([messages], [[picture()]], targets=True)


def test_bad_options_are_refused_by_name():
    with pytest.raises(PromptError, match="conversation 0: turns: expected 'all' or 'last', got 'first'"):
        processor().batch([TURNS], [[picture()]], targets=True, turns="first")
    with pytest.raises(PromptError, match="conversation 0: targets: expected true, false or 'as_released', got 'all'"):
        processor().batch([TURNS], [[picture()]], targets="all")
    nothing = [TURNS[0], {**TURNS[1], "loss": False}]
    with pytest.raises(PromptError, match="conversation 0: expected at least one assistant message"):
        processor().batch([nothing], [[picture()]], targets=True)


def test_as_released_takes_no_weights():
    """LLaVA learns nothing where a question has the head of an answer; by default the answer is learned."""
    marks, asked = {"image": "<image>"}, {"role": "user", "content": "What? ASSISTANT: no."}
    prompt = TemplatePrompt(
        ChatTemplate(VICUNA, TOKENIZER.names), TOKENIZER, marks, marks, split=True, joined="", released=Vicuna(None)
    )
    options = {"add_generation_prompt": False, "targets": "as_released"}
    pieces = prompt([asked, TURNS[3]], (), **options)
    assert learned(pieces) == "" and spelled(pieces).endswith("What? ASSISTANT: no. ASSISTANT: Yes.</s>")
    assert learned(prompt([asked, TURNS[3]], (), **{**options, "targets": True})) == " Yes.</s>"
    for messages, more in (([asked, TURNS[3]], {"turns": "last"}), ([asked, {**TURNS[3], "weight": 0.5}], {})):
        advised = tried("learns what the release's code does; remove turns={} and the keys loss and weight of messages")
        with pytest.raises(PromptError, match=advised):
            prompt(messages, (), **options, **more)
    assert spelled(prompt([asked, TURNS[3]], (), **options))
    with pytest.raises(PromptError, match="expected the role 'user', got 'system'"):
        prompt([{"role": "system", "content": "S"}, *TURNS], (), **options)


def test_a_conversation_may_begin_with_an_answer():
    turns = [{"role": "system", "content": "S"}, TURNS[3], TURNS[0], TURNS[1]]
    for template in (VICUNA, OVIS2):
        for messages in (turns, turns[1:]):
            text, spans = render_learned(
                ChatTemplate(template, TOKENIZER.names), messages, TOKENIZER, add_generation_prompt=False
            )
            assert [text[start:stop].strip().split("<")[0] for start, stop, _ in spans] == ["Yes.", "A cat.\n"]


def test_a_thought_is_learned_and_an_empty_one_that_is_put_in_is_not():
    thinks = [*TURNS[:3], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}]
    text, spans = render_learned(ChatTemplate(OVIS2_5_TRAINING), thinks, TOKENIZER, add_generation_prompt=False)
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\nA cat.\n<|im_end|>\n" in text
    assert [text[start:stop] for start, stop, _ in spans] == ["A cat.\n<|im_end|>", thinks[3]["content"] + "<|im_end|>"]


# The rules of the template of Qwen3.5, and of others that think: only answers after the last question have a thought,
# which is empty where the content has none. `{{ head }}` starts an answer.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set said = m.content.split('</think>')[-1] | trim %}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought | trim + '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if not thinks %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("thinks", [True, False])
def test_answers_before_the_last_question_lack_the_thought(thinks):
    template = ChatTemplate(THINKING, TOKENIZER.names)
    options = {"add_generation_prompt": False, "thinks": thinks}
    opening, end = "\n</think>\n\n" if thinks else "", "<|im_end|>\n"

    def spans(messages, learned=None, **more):
        learned = learned or Learned(end=end)
        text, found = render_learned(template, messages, TOKENIZER, learned, **options, **more)
        assert text == template.render(messages, **options)
        return [(text[start:stop], text[:start].rpartition(end)[2]) for start, stop, _ in found]

    asks, thinks_too = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
    last = (f"{opening}Yes.{end}", thinks_too if thinks else f"{thinks_too}\n</think>\n\n")
    assert spans(TURNS) == [(f"A cat.{end}", asks), last]
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA cat."}
    assert spans([TURNS[0], thought, *TURNS[2:]]) == [(f"A cat.{end}", asks), last]
    assert spans(TURNS, turns="last") == spans([TURNS[0], {**TURNS[1], "loss": False}, *TURNS[2:]]) == [last]
    assert spans([*TURNS, *TURNS])[:3] == [(f"A cat.{end}", asks), (f"Yes.{end}", asks), (f"A cat.{end}", asks)]
    both = spans(TURNS, Learned(end=end, head=True))
    assert both == [(f"{asks}A cat.{end}", ""), (f"{thinks_too}\n</think>\n\nYes.{end}", "")]


def test_a_thought_of_the_last_answer_is_learned():
    thought = [*TURNS[:3], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}]
    options = {"add_generation_prompt": False, "thinks": True}
    text, spans = render_learned(ChatTemplate(THINKING), thought, TOKENIZER, **options)
    assert [text[start:stop] for start, stop, _ in spans] == ["A cat.<|im_end|>", "hm\n</think>\n\nYes.<|im_end|>"]


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
    last = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ messages[-1].content | length }}{% endfor %}"
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
    advised = tried(
        "trained text, at {'hello th'} | {'e dog'}; make the chat template write a space or a special token there"
    )
    with pytest.raises(TokenizerError, match=advised):
        encode_learned(tokenizer, text, [Span(len("hello th"), len(text))], add_special=False)
    spaced = "hello th e dog"
    ids, marked = encode_learned(tokenizer, spaced, [Span(len("hello th"), len(spaced))], add_special=False)
    assert tokenizer.decode([index for index, each in zip(ids, marked, strict=True) if each]).strip() == "e dog"
