"""Prompts that are spelled turn by turn; golden folders have the ids of the releases."""

import pytest

from vlm_jax.processors.layout import Text
from vlm_jax.processors.prompt import Slot
from vlm_jax.processors.spelled_prompt import DeepSeekVL2Prompt, PromptError, QwenVLPrompt, UnmarkedPrompt
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import PictureMismatch

from .test_processor import Letters, picture, processor, say


class Vocabulary(Letters):
    special = {1: "<s>", 2: "</s>", 3: "<image>", 4: "<img>", 5: "</img>", 6: "<imgpad>", 7: "<|im_start|>", 8: "<|im_end|>"}  # noqa: RUF012, E501  # fmt: skip


TOKENIZER = Tokenizer(Vocabulary(), {"bos_token": "<s>", "eos_token": "</s>"})


def spelled(pieces):
    """Text as it is, slots in brackets."""
    decode = Vocabulary().decode
    return "".join(f"[{piece.kind}]" if isinstance(piece, Slot) else decode(list(piece.ids)) for piece in pieces)


def test_deepseek_vl2_learns_what_the_assistant_says():
    messages = [
        {"role": "system", "content": "S "},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q "}]},
        {"role": "assistant", "content": " a"},
    ]
    pieces = DeepSeekVL2Prompt(TOKENIZER)(messages, (), targets=True)
    assert spelled(pieces) == "<s>S<|User|>: [image]\nq\n\n<|Assistant|>:a</s>"
    assert spelled([piece for piece in pieces if isinstance(piece, Text) and piece.learned]) == "a</s>"
    assert spelled(pieces).removesuffix("</s>") == spelled(DeepSeekVL2Prompt(TOKENIZER)(messages, ()))
    with pytest.raises(PromptError, match="message 1 has the role 'system'; expected user or assistant, and system"):
        DeepSeekVL2Prompt(TOKENIZER)(messages[1:2] + messages[:1], ())
    with pytest.raises(PromptError, match="expected only images and text, got enable_thinking"):
        DeepSeekVL2Prompt(TOKENIZER)(messages, (), enable_thinking=True)


def test_an_unmarked_prompt_takes_what_a_processor_gives():
    made = processor()
    made = type(made)(UnmarkedPrompt(TOKENIZER), made.views, TOKENIZER, 2)
    batch = made([{"role": "user", "content": "<image>q"}], [picture()])
    assert batch.tokens[0].tolist() == [1, 3, 3, 3, 100 + ord("q")]


def test_qwen_vl_numbers_the_pictures_of_a_message():
    prompt = QwenVLPrompt(TOKENIZER, system="S")
    content = [{"type": "image", "image": "a"}, {"type": "image"}, {"type": "text", "text": "q"}]
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
    text += "Picture 1: <img>[image]</img>\nPicture 2: <img>[image]</img>\nq"
    pieces = prompt([{"role": "user", "content": content}], ())
    assert spelled(pieces) == text + "<|im_end|>\n<|im_start|>assistant\n"
    assert [piece.first_ids for piece in pieces if isinstance(piece, Slot)] == [(ord("a"),), ()]
    with pytest.raises(PromptError, match="an <img> without </img>"):
        prompt.spelled("x<img>y")


def test_a_path_lies_in_the_first_places_of_its_picture():
    made = processor()
    made = type(made)(QwenVLPrompt(TOKENIZER), made.views, TOKENIZER, 2)
    batch = made([{"role": "user", "content": "<img>é</img>"}], [picture()])
    places = batch.visual_index[0] >= 0
    assert batch.tokens[0][places].tolist() == [0xC3, 0xA9, 6]
    with pytest.raises(PictureMismatch, match="the name of an image has 4 bytes, more than its 3 visual tokens"):
        made([{"role": "user", "content": "<img>abcd</img>"}], [picture()])
    assert len(made(say("q")).tokens[0]) > 0
