"""Generation against a loop that runs the whole sequence again for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.connectors.pool import Pool
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.encoders.vit import ViT
from vlm_jax.generation import engine
from vlm_jax.generation.engine import generate
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.models.vlm import VLM
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import shardings, use_mesh
from vlm_jax.types import Batch

from ..parameters import drawn
from .toys import Toy, prompts, says

VOCAB, PAD, NEW, PROMPT = 40, 39, 6, 7

MODEL = VLM(
    ViT(image_size=(8, 16), patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=16),
    Pool(16, (1, 2)),
    Transformer(VOCAB, 16, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=24, tie_embeddings=False),
)


def prompt(text, image, length=PROMPT):
    """An image's two tokens and text, at the end of a row of `length` columns."""
    size = 2 + len(text)
    pad = length - size

    def row(values, fill):
        return jnp.asarray([[fill] * pad + list(values)], jnp.int32)

    return Batch(
        tokens=row([0, 0, *text], PAD),
        positions=row(range(size), 0),
        segment_ids=row([1] * size, 0),
        visual_index=row([0, 1, *[-1] * len(text)], -1),
        images=image[None, None],
    )


@pytest.fixture(scope="module")
def rows():
    """Prompts of three lengths, each with its image."""
    rng = np.random.default_rng(0)
    pictures = jnp.asarray(rng.normal(size=(3, 8, 16, 3)), jnp.float32)
    return [(rng.integers(0, 38, size=n).tolist(), pictures[i]) for i, n in enumerate((5, 2, 3))]


@pytest.fixture(scope="module")
def params(rows):
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), prompt(*rows[0]))
    return jax.tree.map(lambda p: 2 * p, nn.meta.unbox(drawn(boxed))["params"])  # so that the argmax wanders


@pytest.fixture(scope="module")
def naive(params, rows):
    """The answers without a cache: the whole row again for every token, without padding before it."""
    full = jax.jit(lambda batch: MODEL.apply({"params": params}, batch))
    answers = []
    for text, image in rows:
        text, answer = list(text), []
        for _ in range(NEW):
            # Filled on the right to one length; a causal model does not see that.
            batch = prompt(text + [0] * (PROMPT + NEW - 2 - len(text)), image, PROMPT + NEW)
            answer.append(int(jnp.argmax(full(batch)[0, 1 + len(text)])))
            text.append(answer[-1])
        answers.append(answer)
    return answers


def stack(batches):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


@pytest.fixture(scope="module")
def ragged(rows):
    return stack([prompt(*row) for row in rows])


def result(params, batch, **options):
    return generate(MODEL, params, batch, **{"max_new_tokens": NEW, "pad_id": PAD, **options})


def run(params, batch, **options):
    return result(params, batch, **options).tokens.tolist()


def test_the_naive_answers_tell_something(naive):
    assert len({tuple(answer) for answer in naive}) == 3
    assert len(set(naive[0])) > 2 and len(set(naive[1])) > 2, naive


def test_a_ragged_batch_gives_what_the_naive_loop_gives_row_by_row(params, ragged, naive):
    assert run(params, ragged) == naive


def test_a_row_alone_gives_what_it_gives_in_a_batch(params, rows, naive):
    assert run(params, prompt(*rows[1])) == [naive[1]]
    assert run(params, prompt(*rows[1], length=4)) == [naive[1]]  # without padding


def test_what_padding_holds_changes_nothing(params, ragged, naive):
    hidden = ragged.segment_ids == 0
    other = dataclasses.replace(
        ragged,
        tokens=jnp.where(hidden, 5, ragged.tokens),
        positions=jnp.where(hidden, 3, ragged.positions),
    )
    assert run(params, other) == naive


def test_a_row_ends_at_its_end_token_and_is_padded(params, ragged, naive):
    eos = naive[0][2]

    def cut(answer):
        if eos not in answer:
            return answer
        stop = answer.index(eos) + 1
        return answer[:stop] + [PAD] * (NEW - stop)

    assert cut(naive[0]) != naive[0]
    assert run(params, ragged, end_ids=[eos]) == [cut(answer) for answer in naive]


def test_the_loop_stops_when_every_row_has_ended(params, rows, naive):
    """Rows that all end at once leave the rest as it was filled, without a step."""
    eos = naive[0][0]
    assert run(params, prompt(*rows[0]), end_ids=[eos]) == [[eos] + [PAD] * (NEW - 1)]


def test_fewer_new_tokens_are_the_first_of_more(params, ragged, naive):
    assert run(params, ragged, max_new_tokens=2) == [answer[:2] for answer in naive]


def test_parts_that_the_model_does_not_know_are_left_out(params, ragged, naive):
    """A state may have pre-training heads in addition to the model's parts."""
    assert run({**params, "cell_head": {"kernel": jnp.ones(2)}}, ragged) == naive


def test_padding_on_the_right_gives_the_same(params, rows, naive):
    def turned(batch):
        """The row's padding after it."""
        shift = -int(np.argmax(batch.segment_ids[0] != 0))
        moved = {
            name: jnp.roll(getattr(batch, name), shift, axis=1)
            for name in ("tokens", "positions", "segment_ids", "visual_index")
        }
        return dataclasses.replace(batch, **moved)

    assert run(params, stack([turned(prompt(*row)) for row in rows])) == naive


def test_chunks_and_buckets_change_nothing(params, ragged, naive):
    assert run(params, ragged, chunk=2, buckets=(11,), cache_length=20) == naive


def test_several_images_of_a_row(params, rows):
    """Two images in one row, the second between its words, as the whole row says without a cache."""
    (text, first), (_, second) = rows[0], rows[1]
    places = [0, 1, -1, -1, 2, 3, *[-1] * (len(text) - 2)]
    batch = Batch(
        tokens=jnp.asarray([[0, 0, *text[:2], 0, 0, *text[2:]]], jnp.int32),
        positions=jnp.arange(len(places))[None],
        segment_ids=jnp.ones((1, len(places)), jnp.int32),
        visual_index=jnp.asarray([places], jnp.int32),
        images=jnp.stack([first, second])[None],
    )
    (said,) = run(params, batch)

    def following(words):
        length = len(places) + len(words)
        whole = dataclasses.replace(
            batch,
            tokens=jnp.concatenate([batch.tokens, jnp.asarray([words], jnp.int32)], axis=1),
            positions=jnp.arange(length)[None],
            segment_ids=jnp.ones((1, length), jnp.int32),
            visual_index=jnp.asarray([[*places, *[-1] * len(words)]], jnp.int32),
        )
        return np.asarray(MODEL.apply({"params": params}, whole)[0, len(places) - 1 :])

    assert following(said[:-1]).argmax(-1).tolist() == said
    swapped = dataclasses.replace(batch, images=batch.images[:, ::-1])
    assert run(params, swapped) != [said]


def test_a_cache_in_bfloat16_moves_logits_as_rounding_does(params, ragged, naive):
    """Of new tokens: by at most twice what rounding the content of a float32 cache moves them by."""
    step = jax.jit(lambda *inputs: MODEL.apply({"params": params}, *inputs, method="extend"))

    def logits(dtype, kept=lambda leaf: leaf):
        state, report = engine.prefill(
            {"params": params}, ragged, np.arange(3), np.zeros(3, bool), {}, np.zeros(0, np.int32),
            model=MODEL, pad_id=PAD, cache_length=16, cache_dtype=dtype, mesh=None,
        )  # fmt: skip
        assert np.asarray(report)[:, 0].tolist() == [answer[0] for answer in naive]
        cache, said = state.cache, []
        for place, tokens in enumerate(np.asarray(naive).T[:-1]):
            cache = dataclasses.replace(cache, layers=jax.tree.map(kept, cache.layers))
            row, cache = step(tokens[:, None], state.position[:, None] + place, cache)
            said.append(np.asarray(row))
            assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(dtype)}
        return np.stack(said)

    exact, rounded = logits("float32"), logits("bfloat16")
    alike = logits("float32", lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32))
    assert exact.argmax(axis=-1).T.tolist() == [answer[1:] for answer in naive]
    by_rounding = np.abs(alike - exact).max()
    assert 0 < np.abs(rounded - exact).max() < 2 * by_rounding < 0.05 * np.abs(exact).max()


def test_sharded_over_devices_as_on_one(params):
    """Rows over data and fsdp, heads of the cache over tensor; three rows on four shares."""
    model = VLM(None, None, Transformer(VOCAB, 16, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=24))
    rng = np.random.default_rng(4)
    batch = prompts(*(rng.integers(1, VOCAB, size=size).tolist() for size in (5, 3, 7)))
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)
    whole = jax.tree.map(lambda p: 2 * p, nn.meta.unbox(drawn(boxed))["params"])
    options = {"max_new_tokens": NEW, "chunk": 4, "sampling": Sampling(temperature=1.0, repetition_penalty=1.5)}
    alone = generate(model, whole, batch, **options)
    assert len({tuple(row) for row in alone.tokens.tolist()}) == 3
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(whole, shardings(boxed["params"], mesh))
    states = []

    def kept(*args, **kwargs):
        states.append(prefill(*args, **kwargs))
        return states[-1]

    prefill = engine.prefill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "prefill", kept)
        patch.setattr(engine, "decode", lambda params, state, *args, **kw: decode(params, copied(state), *args, **kw))
        shared = generate(model, placed, batch, mesh=mesh, **options)
    assert shared.tokens.tolist() == alone.tokens.tolist() and shared.steps == alone.steps
    spec = jax.sharding.PartitionSpec(None, ("data", "fsdp"), "tensor")
    for leaf in jax.tree.leaves(states[0][0].cache.layers):
        assert leaf.shape[1] == 4
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), leaf.ndim)
    with pytest.raises(GenerationError, match="expected context=1, got 8"):
        generate(model, whole, batch, mesh=make_mesh(MeshSettings(context=8)), **options)


def test_prompts_with_images_over_devices(params, ragged, naive):
    """Three rows on four shards of the batch: the last one is repeated, with its image."""
    mesh = make_mesh(MeshSettings(data=4, tensor=2))
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), ragged)
    placed = jax.device_put(params, shardings(boxed["params"], mesh))
    assert run(placed, ragged, mesh=mesh) == naive


def test_a_cache_is_laid_out_whatever_the_model_makes_of_it():
    """Of a model that says nothing of its own layout, so that nothing but the engine's rule places the cache."""
    mesh = make_mesh(MeshSettings(data=4, tensor=2))
    with use_mesh(mesh):
        state, _ = engine.prefill(
            {"params": says(range(1, 30), VOCAB)}, prompts(*[[1]] * 4), np.arange(4), np.zeros(4, bool), {},
            np.zeros(0, np.int32), model=Toy(VOCAB), pad_id=PAD, cache_length=16, cache_dtype=None, mesh=mesh,
        )  # fmt: skip
    assert state.cache.layers[0].key.sharding.shard_shape((1, 4, 1, 1, 16)) == (1, 1, 1, 1, 16)


decode = engine.decode


def copied(state):
    """Copies the state, so that it can be read after it was donated."""
    return jax.tree.map(jnp.copy, state)
