"""The model of VLMEvalKit, with a stand-in for the base class: the package is not on the index."""

import sys
import types

import pytest
from PIL import Image

import vlm_jax
from tests.advice import tried
from vlm_jax.config import ConfigError
from vlm_jax.processors.learned import PromptError

from .conftest import PICTURES

QUESTION = "Which colour?"


class BaseModel:
    """What VLMEvalKit's vlmeval/vlm/base.py does with a message of items before `generate_inner`, and with a chat."""

    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        assert isinstance(message, list) and all({"type", "value"} <= item.keys() for item in message)
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset=dataset)


@pytest.fixture
def made(folder, monkeypatch):
    """Makes a model for arguments."""
    base = types.ModuleType("vlmeval.vlm.base")
    base.BaseModel = BaseModel
    for name, module in (("vlmeval", None), ("vlmeval.vlm", None), ("vlmeval.vlm.base", base)):
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    monkeypatch.delitem(sys.modules, "vlm_jax.harnesses.vlmevalkit", raising=False)
    from vlm_jax.harnesses.vlmevalkit import VlmJax

    yield lambda **arguments: VlmJax(pretrained=str(folder), **arguments)
    del sys.modules["vlm_jax.harnesses.vlmevalkit"]  # its base class is the stand-in


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_answers_are_those_of_generate(made, folder, picture):
    model = made(token_budget=4, reducer="visionzip", max_new_tokens=6)
    items = [{"type": "image", "value": picture}, {"type": "text", "value": QUESTION}]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    ours = vlm_jax.from_pretrained(folder, token_budget=4, reducer="visionzip")
    expected = ours.generate([{"role": "user", "content": content}], max_new_tokens=6).text
    assert model.generate(items, dataset="MMBench") == expected
    said = [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    turns = [{"role": "user", "content": content}, *said, {"role": "user", "content": [content[1]]}]
    chat = [{"role": "user", "content": items}, {"role": "assistant", "content": [{"type": "text", "value": "blue"}]}]
    expected = ours.generate(turns, max_new_tokens=6).text
    assert model.chat([*chat, {"role": "user", "content": [items[1]]}]) == expected


def test_items_of_a_role_are_a_message(made, folder):
    items = [{"type": "text", "value": "Be short.", "role": "system"}, {"type": "text", "value": QUESTION}]
    ours = vlm_jax.from_pretrained(folder)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("system", "Be short."), ("user", QUESTION))
    ]
    assert made(max_new_tokens=6).generate(items) == ours.generate(messages, max_new_tokens=6).text


def test_what_is_refused(made, picture):
    with pytest.raises(ConfigError, match=r"model_args\.max_new_token: unknown or unused key"):
        made(max_new_token=5)
    model = made(max_new_tokens=1)
    item = {"type": "image", "value": picture}
    with pytest.raises(PromptError, match=tried("the key '{}' of an item of VLMEvalKit is not read; remove")):
        model.generate([{**item, "min_pixels": 4}, {"type": "text", "value": QUESTION}])
    assert isinstance(model.generate([item, {"type": "text", "value": QUESTION}]), str)
