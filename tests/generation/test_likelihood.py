"""Log-likelihoods of continuations, compared with tokens one after another from a cache, and batches with rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.advice import tried
from tests.contracts import releases
from vlm_jax.generation.likelihood import log_likelihoods
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.layers.mesh_axes import active_mesh
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.learned import PromptError
from vlm_jax.sharding.mesh import MeshSettings, make_mesh

PICTURES = np.random.default_rng(0).integers(0, 255, (8, 20, 28, 3), np.uint8)
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
REDUCERS = {"none": {}, "visionzip": {"token_budget": 4}, "fastv": {"token_budget": 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    releases.make("llava", folder)
    return folder


def one_by_one(model, picture, ids):
    """Log-probabilities of ids after the prompt, and whether each is the most likely: by the cache of generation."""
    batch = model.processor(MESSAGES, [picture])
    prompt, position = batch.tokens.shape[1], int(batch.positions.max())

    @jax.jit
    def run(params, batch, ids):
        variables = {"params": params}
        logits, cache = model.module.apply(variables, batch, prompt + len(ids), method="prefill")
        found = [logits[0]]
        for number in range(len(ids) - 1):
            given = ids[None, number : number + 1], jnp.full((1, 1), position + 1 + number)
            logits, cache = model.module.apply(variables, *given, cache, method="extend")
            found.append(logits[0])
        return jnp.stack(found)

    logits = np.asarray(run(model.params, batch, jnp.asarray(ids)), np.float64)
    scaled = logits - logits.max(-1, keepdims=True)
    log_probs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return log_probs[np.arange(len(ids)), ids], logits.argmax(-1) == ids


@pytest.mark.parametrize("reducer", REDUCERS)
def test_a_row_is_what_tokens_are_one_after_another(folder, reducer):
    """Also where the decoder drops visual tokens, which the prompt ranks and not the continuation."""
    model = vlm_jax.from_pretrained(folder, reducer=None if reducer == "none" else reducer, **REDUCERS[reducer])
    ids = model.tokenizer.encode(" é")
    (found,) = model.log_likelihoods(MESSAGES, [" é"], [PICTURES[0]])
    log_probs, best = one_by_one(model, PICTURES[0], ids)
    assert found.num_tokens == len(ids) == 3
    np.testing.assert_allclose(found.log_likelihood, log_probs.sum(), rtol=1e-5)
    assert found.is_greedy == best.all()


def test_a_batch_of_eight_is_eight_batches(folder):
    """Continuations and prompts of different lengths, over one bucket."""
    model = vlm_jax.from_pretrained(folder, reducer="visionzip", token_budget=4)
    texts = [" a", " blue", "!", " red", " no idea", " é", "x", " yes"]
    asked = [[{**MESSAGES[0], "content": [{"type": "image"}, {"type": "text", "text": "?" * n}]}] for n in range(1, 9)]
    images = [[picture] for picture in PICTURES]
    system, params = model.system, model.system.prepared(model.params)
    together = system.log_likelihoods(params, asked, texts, images)
    for row, found in enumerate(together):
        (alone,) = system.log_likelihoods(params, asked[row : row + 1], texts[row : row + 1], images[row : row + 1])
        np.testing.assert_allclose(found.log_likelihood, alone.log_likelihood, rtol=1e-5)
        assert (found.is_greedy, found.num_tokens) == (alone.is_greedy, alone.num_tokens)
        assert found.num_tokens == len(texts[row].encode())
    assert len({found.log_likelihood for found in together}) == 8


def test_the_most_likely_first_token_is_greedy(folder):
    """Of all bytes, the one with the greatest log-likelihood, if no special token is before it."""
    model = vlm_jax.from_pretrained(folder)
    texts = [chr(number) for number in range(32, 127)]
    found = model.log_likelihoods(MESSAGES, texts, [PICTURES[0]])
    logits = np.asarray(model.logits(model.processor(MESSAGES, [PICTURES[0]])))[0, -1]
    expected = [model.tokenizer.encode(text) == [logits.argmax()] for text in texts]
    assert [one.is_greedy for one in found] == expected
    np.testing.assert_allclose(
        [one.log_likelihood for one in found],
        jax.nn.log_softmax(logits)[np.asarray([model.tokenizer.encode(text)[0] for text in texts])],
        rtol=1e-5,
    )


@pytest.mark.parametrize("settings", [{"data": 4, "context": 2}, {"data": 4, "tensor": 2}])
def test_over_devices_as_on_one(folder, settings, monkeypatch):
    """Also of a mesh that shards the sequence, which generation does not."""
    mesh, meshes, original = make_mesh(MeshSettings(**settings)), [], VLM.hidden

    def noted(*args, **kwargs):
        meshes.append(active_mesh())
        return original(*args, **kwargs)

    texts, alone = [" red", " no idea"], vlm_jax.from_pretrained(folder)
    expected = alone.log_likelihoods(MESSAGES, texts, [PICTURES[0]])
    monkeypatch.setattr(VLM, "hidden", noted)
    found = vlm_jax.from_pretrained(folder, mesh=mesh).log_likelihoods(MESSAGES, texts, [PICTURES[0]])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, rtol=1e-5)
    assert meshes == [mesh.abstract_mesh]


def test_what_is_refused(folder):
    model = vlm_jax.from_pretrained(folder)
    with pytest.raises(PromptError, match=tried("continuations: expected a list of texts, got {}; write ['…']")):
        model.log_likelihoods(MESSAGES, " red", [PICTURES[0]])
    assert len(model.log_likelihoods(MESSAGES, [" red"], [PICTURES[0]])) == 1
    with pytest.raises(PromptError, match=tried("is empty; give it at least one token")):
        model.log_likelihoods(MESSAGES, [" red", ""], [PICTURES[0]])
    with pytest.raises(PromptError, match="expected one for each of 1 conversations, got 2"):
        model.processor.batch([MESSAGES], [[PICTURES[0]]], continuations=[" red", " blue"])
    answered = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    with pytest.raises(PromptError, match=tried("got both; remove one of them")):
        model.processor.batch([answered], [[PICTURES[0]]], continuations=[" red"], targets=True)
    assert model.processor.batch([answered], [[PICTURES[0]]], targets=True).targets is not None
    with pytest.raises(GenerationError, match=tried("expected a batch with continuations; pass them")):
        log_likelihoods(model.module, model.params, model.processor(MESSAGES, [PICTURES[0]]))
    batch = model.processor.batch([MESSAGES], [[PICTURES[0]]], continuations=[" red"])
    (found,) = log_likelihoods(model.module, model.params, batch)
    assert found == model.log_likelihoods(MESSAGES, [" red"], [PICTURES[0]])[0]


def test_nan_is_named(folder):
    model = vlm_jax.from_pretrained(folder)
    batch = model.processor.batch([MESSAGES], [[PICTURES[0]]], continuations=[" red"])
    broken = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    words = tried("{}: the likelihood of its continuation is NaN; check the images and the parameters for NaN, or ")
    with pytest.raises(GenerationError, match=f"^sample 7{words}"):
        log_likelihoods(model.module, broken, batch, names=["sample 7"])
    assert np.isfinite(log_likelihoods(model.module, model.params, batch)[0].log_likelihood)
