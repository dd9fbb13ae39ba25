"""PaliGemma and PaliGemma 2 of transformers compared with ours: one question about images, to the answer and back."""

import jax
import numpy as np
import pytest
import torch

import vlm_jax
from vlm_jax.generation.text import complete

from .processors import pictures, same_tiles
from .systems import paligemma, paligemma2

NEW = 32
OPTIONS = {"max_new_tokens": NEW, "chunk": 9}
TEXTS = ("What is é this? 12", "detect <loc0012> cat ; dog", "")


@pytest.fixture(scope="module", params=(paligemma, paligemma2), ids=lambda made: made.__name__)
def system(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def asked(text, count):
    return [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": text}]}]


def official(system, text, images):
    """Inputs of the reference; without images those of a text alone, which its processor refuses."""
    processor = system[0]
    if images:
        given = processor(images=[images], text=["<image>" * len(images) + text], return_tensors="np")
        del given["labels"]
    else:
        vocabulary = processor.tokenizer
        texts = [f"{vocabulary.bos_token}{text}\n"]
        given = vocabulary(texts, return_token_type_ids=True, return_tensors="np")
    return {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()}


def said(system, given):
    processor, model, _ = system
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    ids = model.generate(**given, max_new_tokens=NEW, do_sample=False, **ends)[0, given["input_ids"].shape[1] :]
    return ids.tolist(), processor.tokenizer.decode(ids, skip_special_tokens=True)


def logits_of(model, given):
    with torch.no_grad():
        return model(**given).logits.numpy()


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("text", TEXTS)
def test_from_a_question_to_the_answer(system, text, count):
    _, model, ours = system
    given, batch = official(system, text, pictures(count)), ours.processor(asked(text, count), pictures(count))
    np.testing.assert_array_equal(batch.tokens, given["input_ids"])
    np.testing.assert_array_equal(batch.segment_ids, given["attention_mask"])
    np.testing.assert_array_equal(batch.group_ids, 1 - given["token_type_ids"])
    if count:
        same_tiles(batch, given)
    expected, found = logits_of(model, given), np.asarray(ours.logits(batch))
    assert found.dtype == np.float32 and np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    ids, words = said(system, given)
    answer = ours.generate(asked(text, count), pictures(count), **OPTIONS)
    assert list(answer.tokens) == ids and answer.text == words


def test_the_prefix_is_read_in_both_directions(system):
    """Unlike where all of the sequence is suffix to the reference."""
    given = official(system, TEXTS[0], pictures(1))
    expected = logits_of(system[1], given)
    causal = logits_of(system[1], {**given, "token_type_ids": torch.ones_like(given["token_type_ids"])})
    assert np.abs(expected - causal).max() > 1e-2 * np.abs(expected).max()


def test_text_between_images_is_before_the_start(system):
    processor, _, ours = system
    items = [
        {"type": "text", "text": "One: "},
        {"type": "image"},
        {"type": "text", "text": " two: "},
        {"type": "image"},
    ]
    items.append({"type": "text", "text": " same?"})
    given = processor(images=[pictures(2)], text=["One: <image> two: <image> same?"], return_tensors="np")
    for messages in (
        [{"role": "user", "content": items}],
        [{"role": "user", "content": "One: <image> two: <image> same?"}],
    ):
        batch = ours.processor(messages, pictures(2))
        np.testing.assert_array_equal(batch.tokens, given["input_ids"])


def test_the_way_back(system, tmp_path):
    """What is written is what was read: for transformers, and for us, processor and all."""
    _, model, ours = system
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = official(system, TEXTS[0], pictures(2))
    np.testing.assert_array_equal(logits_of(again, given), logits_of(model, given))
    reread = vlm_jax.from_pretrained(tmp_path / "ours")
    batches = [one.processor(asked(TEXTS[0], 2), pictures(2)) for one in (ours, reread)]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    np.testing.assert_array_equal(ours.logits(batches[0]), reread.logits(batches[1]))


def test_answers_of_a_ragged_batch(system):
    ours = system[2]
    given = [(asked(TEXTS[1], 1), pictures(1)), (asked(TEXTS[0], 2), pictures(3)[1:])]
    batch = ours.processor.batch(*zip(*given, strict=True))
    assert (batch.segment_ids == 0).any()
    answers = complete(ours.module, ours.params, batch, ours.tokenizer, end_ids=ours.end_ids, max_new_tokens=NEW)
    alone = [ours.generate(*one, **OPTIONS).tokens for one in given]
    assert [answer.tokens for answer in answers] == alone
    wanted = [said(system, official(system, *one))[0] for one in ((TEXTS[1], pictures(1)), (TEXTS[0], pictures(3)[1:]))]
    assert [list(answer) for answer in alone] == wanted
    assert wanted[0] != wanted[1] and len({*wanted[0], *wanted[1]}) > 1


def test_targets_are_the_suffix(system):
    """With the reference's labels: the answer and its end."""
    processor, _, ours = system
    messages = [*asked("Where?", 1), {"role": "assistant", "content": "<loc0004><loc1023><loc0000><loc0512> cat"}]
    texts = {"text": ["<image>Where?"], "suffix": [messages[1]["content"]]}
    given = processor(images=[pictures(1)], **texts, return_tensors="np")
    batch = ours.processor.batch([messages], [pictures(1)], targets=True)
    np.testing.assert_array_equal(batch.tokens, given["input_ids"])
    np.testing.assert_array_equal(batch.group_ids, 1 - given["token_type_ids"])
    labels = np.where(batch.loss_weights > 0, batch.targets, -100)
    np.testing.assert_array_equal(labels[:, :-1], given["labels"][:, 1:])
    assert (batch.targets[batch.loss_weights > 0] == ours.tokenizer.eos_id).sum() == 1
