"""transformers' logits processors, in the order that its `generate` puts them in, compared with ours."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, NoRepeatNGramLogitsProcessor

from vlm_jax.generation.repeats import repeats_of
from vlm_jax.generation.sampling import Sampling, filtered, penalised

VOCAB = 50


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 60])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.85])
@pytest.mark.parametrize("penalty", [None, 1.3, 0.8])
def test_logits_that_are_drawn_from(model, temperature, top_k, top_p, penalty):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32) * 3
    ids = rng.integers(0, VOCAB, size=(3, 9))
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=1.0 if penalty is None else penalty,
    )
    theirs = model._get_logits_processor(config, input_ids_seq_length=9)(torch.tensor(ids), torch.tensor(logits))
    ours = jnp.asarray(logits)
    if penalty is not None:
        seen = np.zeros(logits.shape, bool)
        np.put_along_axis(seen, ids, True, axis=1)
        ours = penalised(ours, jnp.asarray(seen), np.float32(penalty))
    k, p = None if top_k is None else np.int32(top_k), None if top_p is None else np.float32(top_p)
    np.testing.assert_allclose(filtered(ours / np.float32(temperature), k, p), theirs.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ngrams_that_are_not_repeated(size):
    """Of few ids, so that there are many repeated n-grams."""
    ids = np.random.default_rng(size).integers(0, 4, size=(3, 30))
    theirs = NoRepeatNGramLogitsProcessor(size)(torch.tensor(ids), torch.zeros(3, 6)).isinf().numpy()
    values = Sampling(no_repeat_ngram=size).values()
    repeats = repeats_of(jnp.asarray(ids), jnp.ones(ids.shape, bool), 1)
    ours = repeats.excluded(values["no_repeat_ngram"], values["no_repeat_window"], 6)
    np.testing.assert_array_equal(ours, theirs)
    assert theirs.any() and not theirs.all()
