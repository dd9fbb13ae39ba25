"""`generate` of transformers compared with ours, from the files of one folder: messages in, ids and text out."""

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

import vlm_jax
from vlm_jax.generation.sampling import Sampling
from vlm_jax.generation.text import complete

NEW = 32
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is é? 12"}],
]


def byte_tokenizer():
    """Bytes, and a few pairs, as Llama 3 and Qwen have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE({letter: i for i, letter in enumerate([*alphabet, "th", "is"])}, [("t", "h"), ("i", "s")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    # Put before texts, and not before what a template wrote.
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 258)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|user|>"],
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(path)
    return path, model.eval(), tokenizer


@pytest.fixture(scope="module")
def ours(folder):
    return vlm_jax.from_pretrained(folder[0])


def theirs(folder, messages, **options):
    """New ids, and their text."""
    _, model, tokenizer = folder
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy(folder, ours, messages, penalty):
    ids, text = theirs(folder, messages, repetition_penalty=penalty)
    told = []
    answer = ours.generate(
        messages, max_new_tokens=NEW, sampling=Sampling(repetition_penalty=penalty), on_text=told.append, chunk=5
    )
    assert list(answer.tokens) == ids and answer.text == "".join(told) == text
    assert len(set(ids)) > 2 and answer.reason == "length"


@pytest.mark.parametrize("messages", MESSAGES)
def test_end_tokens_of_the_folder(folder, ours, messages):
    free = theirs(folder, messages)[0]
    ends = [free[9], free[20]]
    ids, _ = theirs(folder, messages, eos_token_id=ends)
    other = vlm_jax.from_pretrained(folder[0], config={**ours.config, "eos_token_id": ends})
    answer = other.generate(messages, max_new_tokens=NEW)
    assert list(answer.tokens) == ids and answer.reason == "end" and len(ids) < NEW


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("chunk", [1, 32])
def test_stop_strings(folder, ours, messages, chunk):
    """Two characters from the middle of the answer; transformers keeps the tokens up to it as well."""
    text = theirs(folder, messages)[1]
    place = next(i for i in range(len(text) // 3, len(text) - 1) if text[i : i + 2].isascii())
    stop = text[place : place + 2]
    ids, whole = theirs(folder, messages, stop_strings=[stop], tokenizer=folder[2])
    answer = ours.generate(messages, max_new_tokens=NEW, stop=[stop], chunk=chunk)
    assert list(answer.tokens) == ids and answer.reason == "stop"
    assert answer.text == whole[: whole.index(stop)] == text[: text.index(stop)]


def test_conversations_of_several_lengths_together(folder, ours):
    batch = ours.processor.batch(MESSAGES)
    assert np.count_nonzero(batch.segment_ids[0]) < batch.tokens.shape[1]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES[1]]
    np.testing.assert_array_equal(ours.processor(parts).tokens, batch.tokens[1:])
    answers = complete(ours.module, ours.params, batch, ours.tokenizer, end_ids=(), max_new_tokens=NEW)
    assert [list(answer.tokens) for answer in answers] == [theirs(folder, messages)[0] for messages in MESSAGES]
