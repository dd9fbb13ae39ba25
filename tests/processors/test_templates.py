"""Templates of releases' code, written out as their code writes them."""

import pytest

from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.templates import DEEPSEEK, INTERNVL, OVIS2, OVIS2_5, VICUNA

TURNS = [
    {"role": "user", "content": "<image>\nWhat?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def chatml(end):
    said = f"<|im_start|>user\n<image>\nWhat?{end}<|im_start|>assistant\nA cat.{end}<|im_start|>user\nSure?{end}"
    return f"<|im_start|>system\nBe brief.{end}{said}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (VICUNA, "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"),
        (DEEPSEEK, "Be brief.\n\nUser: <image>\nWhat?\n\nAssistant: A cat.[end]User: Sure?\n\nAssistant:"),
        (INTERNVL["Hermes-2"], chatml("<|im_end|>")),
        (INTERNVL["internvl2_5"], chatml("<|im_end|>\n")),
        (OVIS2, chatml("<|im_end|>\n")),
        (OVIS2_5, chatml("<|im_end|>\n")),
    ],
)
def test_a_conversation(template, expected):
    rendered = ChatTemplate(template, {"eos_token": "[end]"}).render([SYSTEM, *TURNS])
    assert rendered == expected
    without = ChatTemplate(template, {"eos_token": "[end]"}).render(TURNS, add_generation_prompt=False)
    assert without.endswith(("Sure? ", "Sure?\n\n", "Sure?<|im_end|>", "Sure?<|im_end|>\n"))


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (VICUNA, "A chat between a curious user and an artificial intelligence assistant. The assistant gives"),
        (DEEPSEEK, "You are a helpful language and vision assistant. You are able to understand the visual content"),
        (INTERNVL["internlm2-chat"], "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的"),
        (INTERNVL["internvl2_5"], "<|im_start|>system\n你是书生·万象，英文名是InternVL，"),
        (OVIS2, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"),
        (OVIS2_5, "<|im_start|>user\n"),
    ],
)
def test_what_stands_before_a_conversation_without_a_system_message(template, begins):
    assert ChatTemplate(template, {"eos_token": "[end]"}).render(TURNS).startswith(begins)


def test_a_thought_is_left_out_where_it_is_told():
    render = ChatTemplate(OVIS2_5).render
    assert render(TURNS, enable_thinking=False) == render(TURNS) + "<think>\n\n</think>\n\n"
    assert render(TURNS, enable_thinking=True) == render(TURNS)


def test_thoughts_of_answers_are_left_out():
    asked, answered = TURNS[:1], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA cat."}
    render = ChatTemplate(OVIS2_5).render
    assert render([*asked, answered]) == render([*asked, {"role": "assistant", "content": "A cat."}])
