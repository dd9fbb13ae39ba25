"""Tokenizers and chat templates of transformers compared with ours, over small files made here."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.tokenizer import Tokenizer

from ..processors.vocabularies import TEXTS, sentencepiece_model

LINES = [
    *TEXTS,
    "",
    "hello",
    "two\n\nlines\tand 1234 numbers",
    "é 🦊 ünïcode, 世界!",
    "<s>hello</s>world",
    "the</s> the  <extra>the",
    "trailing  ",
]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ bos_token }}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}\n{% if message.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    "<|im_start|>{{ message['role'] + '\n' }}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}<image>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n    {% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "what <is> it?\n"}]},
    {"role": "assistant", "content": "a dog", "name": None},
    {"role": "user", "content": "sure?"},
]


def same(ours, theirs, line):
    ids = theirs.encode(line)
    assert ours.encode(line, add_special=True) == ids
    assert ours.encode(line) == theirs.encode(line, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a SentencePiece model alone, as LLaVA's."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "additional_special_tokens": ["<extra>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("line", LINES)
def test_llama(llama, line):
    theirs = transformers.LlamaTokenizer.from_pretrained(llama, legacy=False, add_bos_token=True)
    same(Tokenizer.from_folder(llama), theirs, line)


@pytest.mark.parametrize("line", LINES)
def test_legacy_sentencepiece(llama, tmp_path, line):
    """The slow tokenizers, which InternLM2 and the first LLaVAs use: a space before every stretch."""
    model = llama / "tokenizer.model"
    theirs = SentencePieceBackend(
        vocab_file=str(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["<extra>"]
    )
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": ["<extra>"]}))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode(line) == theirs.encode(line, add_special_tokens=False)
    assert ours.vocab_size == len(theirs)


@pytest.fixture(scope="module", params=["tokenizer.json", "two files"])
def qwen2(request, tmp_path_factory):
    """A folder as Qwen2's, with a tokenizer.json or with vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("qwen2")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    content = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in content["merges"]]
    special = ["<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = transformers.Qwen2Tokenizer(
        content["vocab"], merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    if request.param == "two files":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        added = {name: tokenizer.convert_tokens_to_ids(name) for name in ["<|endoftext|>", *special]}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder, tokenizer


@pytest.mark.parametrize("line", [*LINES, "<|im_start|>user\nhi<image><|im_end|>\n"])
def test_qwen2(qwen2, line):
    folder, theirs = qwen2
    same(Tokenizer.from_folder(folder), theirs, line)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[:1], [{"role": "system", "content": "x"}, *MESSAGES]])
@pytest.mark.parametrize("tools", [None, [{"name": "f", "about": "<é>"}]])
def test_chat_templates(qwen2, messages, generate, tools):
    folder, theirs = qwen2
    ours = Tokenizer.from_folder(folder)
    text = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generate, tools=tools, bos_token="B"
    )
    template = ChatTemplate.from_folder(folder, ours.names)
    assert template.render(messages, add_generation_prompt=generate, tools=tools, bos_token="B") == text
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
