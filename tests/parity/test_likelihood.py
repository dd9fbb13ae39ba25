"""Log-likelihoods of continuations, compared with the logits of transformers on the same folder."""

import pytest
import torch

from .processors import conversation, official, pictures
from .systems import llava, llava_onevision, qwen2_5_vl

TEXTS = [" A cat.", "é 12", "no", " Is it?"]


@pytest.fixture(scope="module", params=(llava, qwen2_5_vl), ids=lambda made: made.__name__)
def system(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def expected(system, messages, images, text):
    """(sum of log-probabilities, whether all are the most likely, number) of the ids behind those of the prompt."""
    processor, model, _ = system
    prompt = official(processor, messages, images, "pt")["input_ids"].shape[1]
    whole = processor.apply_chat_template(messages, add_generation_prompt=True) + text
    special = {"add_special_tokens": False} if whole.startswith(processor.tokenizer.bos_token) else {}
    inputs = processor(images=images or None, text=[whole], return_tensors="pt", **special)
    with torch.no_grad():
        log_probs = model(**inputs).logits[0].double().log_softmax(-1)
    ids = inputs["input_ids"][0, prompt:]
    own = log_probs[prompt - 1 : -1]
    return own.gather(1, ids[:, None]).sum().item(), bool((own.argmax(-1) == ids).all()), len(ids)


@pytest.mark.parametrize("count", (0, 2))
def test_likelihoods_are_those_of_transformers(system, count):
    check_likelihoods(system, count)


@pytest.mark.parametrize("system", (llava_onevision,), indirect=True, ids=lambda made: made.__name__)
def test_likelihoods_behind_a_resized_grid_of_tokens(system):
    check_likelihoods(system, 1)


def check_likelihoods(system, count):
    messages, images = conversation(count), pictures(count)
    found = system[2].log_likelihoods(messages, TEXTS, images)
    for text, one in zip(TEXTS, found, strict=True):
        total, greedy, number = expected(system, messages, images, text)
        assert abs(one.log_likelihood - total) <= 1e-4 * abs(total)
        assert (one.is_greedy, one.num_tokens) == (greedy, number)


def test_what_transformers_says_is_greedy(system):
    """Its first token, for as many questions as it takes until that is a letter; and no other letter."""
    processor, model, ours = system
    for number in range(100):
        messages = [{"role": "user", "content": [{"type": "text", "text": f"{number}?"}]}]
        with torch.no_grad():
            first = model(**official(processor, messages, [], "pt")).logits[0, -1].argmax().item()
        text = processor.tokenizer.decode([first])
        if text.isascii() and text.isprintable() and len(text) == 1:
            break
    other = "a" if text != "a" else "b"
    found = ours.log_likelihoods(messages, [text, other])
    assert [one.is_greedy for one in found] == [True, False]
