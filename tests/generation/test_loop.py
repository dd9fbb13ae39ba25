"""The loop by itself, with a model whose answers are written down: ends, steps, positions, draws and errors."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.generation import engine
from vlm_jax.generation.buckets import bucket, fitted
from vlm_jax.generation.engine import generate
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.sharding.mesh import MeshSettings, make_mesh

from ..advice import tried
from .toys import Toy, prompts, says

VOCAB, PAD = 32, 31
MODEL = Toy(VOCAB)
COUNTING = says(range(1, 30), VOCAB)  # 1, 2, 3 … 29, 1 …
NOISE = {"table": np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)}
DRAWS = Sampling(temperature=1.0, seed=5)


@pytest.fixture
def compiled():
    """The programs that are compiled from here on, including cached ones; one entry each."""
    programs = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(seconds)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


def run(params, batch, model=MODEL, **options):
    return generate(model, params, batch, **{"max_new_tokens": 8, "pad_id": PAD, "chunk": 4, **options})


@pytest.mark.parametrize(
    ("end_ids", "tokens", "lengths", "steps"),
    [
        ((), [[3, 4, 5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 11, 12, 13, 14]], [8, 8], 7),
        ((9,), [[3, 4, 5, 6, 7, 8, 9, PAD], [7, 8, 9, *[PAD] * 5]], [7, 3], 6),
        ((4, 9), [[3, 4, *[PAD] * 6], [7, 8, 9, *[PAD] * 5]], [2, 3], 2),
        ((3, 7), [[3, *[PAD] * 7], [7, *[PAD] * 7]], [1, 1], 0),
    ],
)
@pytest.mark.parametrize("chunk", [1, 4, 20])
def test_rows_end_by_themselves_and_no_step_is_run_for_nothing(end_ids, tokens, lengths, steps, chunk):
    result = run(COUNTING, prompts([1, 2], [6]), end_ids=end_ids, chunk=chunk)
    assert result.tokens.tolist() == tokens and result.lengths.tolist() == lengths
    assert result.steps == steps
    assert result.transfers == 1 + -(-steps // chunk)


class Sealed:
    """What stays on the device: the host can hand it on, and look at nothing in it."""

    def __init__(self, content):
        self._content = content


class Fetched:
    """An array that is on the device until somebody reads it."""

    is_fully_addressable = True

    def __init__(self, array, log):
        self._array, self._log = array, log

    def __array__(self, dtype=None, copy=None):
        self._log.append(self._array.shape)
        return np.asarray(self._array, dtype)


@pytest.mark.parametrize("batch", [prompts([1]), prompts([1], [2], [3])])
def test_one_array_a_chunk_comes_to_the_host(monkeypatch, batch):
    fetched, prefill, decode = [], engine.prefill, engine.decode

    def sealed(results):
        state, report = results
        return Sealed(state), Fetched(report, fetched)

    monkeypatch.setattr(engine, "prefill", lambda *args, **kwargs: sealed(prefill(*args, **kwargs)))
    monkeypatch.setattr(
        engine, "decode", lambda params, state, *args, **kwargs: sealed(decode(params, state._content, *args, **kwargs))
    )
    result = run(COUNTING, batch, chunk=3)
    size = len(batch.tokens)
    assert fetched == [(size, 1 + 4 + 1), (size, 3 + 4), (size, 3 + 4), (size, 3 + 4)]
    assert result.transfers == len(fetched) and result.lengths.tolist() == [8] * size


def test_a_row_that_the_host_ends_takes_no_more_tokens():
    seen = []

    def watch(new, counts):
        seen.append([ids[:count] for ids, count in zip(new.tolist(), counts.tolist(), strict=True)])
        return np.asarray([5 in ids for ids in seen[-1]])

    result = run(COUNTING, prompts([1, 2], [6], [20]), watch=watch, end_ids=[9], chunk=2)
    alone = [[[], [], ids] for ids in ([24, 25], [26, 27], [28])]
    assert seen == [[[3], [7], [21]], [[4, 5], [8, 9], [22, 23]], *alone]
    assert result.lengths.tolist() == [3, 3, 8] and result.tokens[0].tolist() == [3, 4, 5, *[PAD] * 5]


@pytest.mark.parametrize("axes", [None, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_new_tokens_go_on_from_the_largest_position_of_a_row(side, axes):
    batch = prompts([5, 5, 5, 5], [5], side=side, axes=axes)
    if axes:  # as after an image: rows and columns increase while time is constant
        batch.positions[..., 0] = 0
        batch.positions[0, np.flatnonzero(batch.segment_ids[0])[1], 1] = 9
    result = run({"table": NOISE["table"]}, batch, Toy(VOCAB, tells_position=True), max_new_tokens=4)
    first = 10 if axes else 4
    assert result.tokens.tolist() == [[3, first, first + 1, first + 2], [0, 1, 2, 3]]


def test_draws_depend_on_the_seed_and_the_rows_number_alone():
    batch = prompts([1, 2, 3], [4], [5])
    whole = run(NOISE, batch, sampling=DRAWS)
    assert run(NOISE, batch, sampling=DRAWS).tokens.tolist() == whole.tokens.tolist()
    for options in ({"chunk": 1}, {"cache_length": 40}, {"buckets": [30]}):
        assert run(NOISE, batch, sampling=DRAWS, **options).tokens.tolist() == whole.tokens.tolist()
    other = run(NOISE, batch, sampling=dataclasses.replace(DRAWS, seed=6))
    assert all((whole.tokens != other.tokens).any(axis=1))
    alone, first = (run(NOISE, prompts([5]), sampling=DRAWS, rows=rows).tokens[0].tolist() for rows in ([2], None))
    assert alone == whole.tokens[2].tolist() != first


def test_draws_have_the_probabilities_of_the_logits():
    """2,000 rows draw one token; counts are within five standard deviations of the softmax."""
    rows = 2000
    result = run(NOISE, prompts(*[[7]] * rows), max_new_tokens=1, sampling=Sampling(temperature=2.0, top_k=5))
    logits = NOISE["table"][7] / 2.0
    kept = np.argsort(logits)[-5:]
    expected = np.zeros(VOCAB)
    expected[kept] = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    counts = np.bincount(result.tokens[:, 0], minlength=VOCAB)
    assert (np.abs(counts - rows * expected) <= 5 * np.sqrt(rows * expected * (1 - expected))).all()


def test_a_penalty_reads_the_prompt_and_the_answer_and_no_padding():
    table = np.zeros((VOCAB, VOCAB), np.float32)
    table[:, 1:5] = [1.0, 0.9, 0.8, 0.7]
    penalty = Sampling(repetition_penalty=2.0)
    result = run({"table": table}, prompts([9, 2, 9], [9]), sampling=penalty, max_new_tokens=5)
    # 1, 3 and 4 are new to the first row; after them 1 is the largest of what all have been halved to.
    assert result.tokens.tolist() == [[1, 3, 4, 1, 1], [1, 2, 3, 4, 1]]
    # Padding is token 0 here; were it penalised, the second row would say 1 first.
    table[:, 0] = 1.5
    padded = run({"table": table}, prompts([9, 2, 9], [9]), sampling=penalty, max_new_tokens=2)
    assert padded.tokens[1].tolist() == [0, 1]


@pytest.mark.parametrize(("first", "step"), [(2, 0), (1, 1), (3, None)])
def test_logits_that_are_nan_are_named_by_row_and_step(first, step):
    table = COUNTING["table"].copy()
    table[[2, PAD]] = np.nan  # of padding, which continues where a row has ended, none is reported
    batch = prompts([10], [first])
    if step is None:
        assert run({"table": table}, batch, end_ids=[6]).lengths.tolist() == [8, 3]
        return
    with pytest.raises(GenerationError, match=rf"sample 'b': .* new token {step} \(from 0\)") as caught:
        run({"table": table}, batch, names=["sample 'a'", "sample 'b'"])
    assert re.search(
        tried("are NaN; check the parameters and the images for NaN, or compute in float32"), str(caught.value)
    )
    assert run({"table": np.nan_to_num(table)}, batch).lengths.tolist() == [8, 8]


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_a_row_that_is_nan_leaves_and_the_others_go_on(chunk):
    table = COUNTING["table"].copy()
    table[[2, 8]] = np.nan
    lost = []
    result = run(
        {"table": table}, prompts([10], [1], [2], [20], [4]), chunk=chunk, on_nan=lambda *row: lost.append(row)
    )
    assert [row for row, _ in lost] == [2, 1, 4]
    steps = [re.search(r"row (\d): .* new token (\d) \(from 0\) are NaN", str(error)).groups() for _, error in lost]
    assert steps == [("2", "0"), ("1", "1"), ("4", "4")]
    assert result.lengths.tolist() == [8, 1, 0, 8, 4]
    assert result.tokens[[0, 3]].tolist() == [[*range(11, 19)], [*range(21, 29)]]
    assert result.tokens[4, :4].tolist() == [5, 6, 7, 8] and result.tokens[1, 0] == 2


def test_rows_draw_with_settings_of_their_own_and_tell_their_prompts():
    settings = [DRAWS, Sampling(temperature=2.0, seed=6), Sampling(temperature=0.5, seed=5)]
    batch, told = prompts([1, 2, 3], [4], [5]), []
    whole = run(NOISE, batch, sampling=settings, rows=[0, 0, 0], on_prompts=told.append)
    for row, (ids, one) in enumerate(zip(([1, 2, 3], [4], [5]), settings, strict=True)):
        assert run(NOISE, prompts(ids), sampling=one).tokens[0].tolist() == whole.tokens[row].tolist()
    assert [lengths.tolist() for lengths in told] == [[[3], [1], [1]]]
    shared = run(NOISE, batch, sampling=settings, rows=[0, 0, 0], mesh=make_mesh(MeshSettings(data=8)))
    assert shared.tokens.tolist() == whole.tokens.tolist()
    with pytest.raises(GenerationError, match="sampling: expected one for each of the 3 rows of the batch, got 2"):
        run(NOISE, batch, sampling=settings[:2])


@pytest.mark.parametrize("chunk", [1, 2, 4, 20])
@pytest.mark.parametrize("mesh", [None, MeshSettings(data=4, tensor=2)])
def test_nan_behind_the_end_of_a_row_that_the_host_ends_is_no_error(chunk, mesh):
    """The first row is ended at 5; the second continues to 12, after which its logits are NaN too."""
    table = COUNTING["table"].copy()
    table[[6, 12]] = np.nan
    told = [[], []]

    def until(*ends):
        def watch(new, counts):
            for row, (ids, count) in enumerate(zip(new.tolist(), counts, strict=True)):
                told[row] += ids[:count]
            return np.asarray([last in ids for last, ids in zip(ends, told, strict=True)])

        return watch

    batch, options = prompts([3], [7]), {"chunk": chunk, "mesh": mesh and make_mesh(mesh)}
    result = run({"table": table}, batch, watch=until(5, 12), **options)
    assert result.tokens[0, :2].tolist() == [4, 5]
    assert result.tokens[1, :5].tolist() == [8, 9, 10, 11, 12]
    assert set(result.tokens[0, 2:].tolist()) <= {6, PAD} and set(result.tokens[1, 5:].tolist()) == {PAD}
    told[:] = [], []
    with pytest.raises(GenerationError, match=r"row 1: .* new token 5 \(from 0\) are NaN"):
        run({"table": table}, batch, watch=until(5, int(np.argmax(table[12]))), **options)
    assert told[1] == [8, 9, 10, 11, 12]  # and no token that NaN chose


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"chunk": 0}, "chunk: expected 1 or more, got 0"),
        ({"end_ids": [3, VOCAB]}, f"end_ids: expected 0 to {VOCAB - 1}, got {VOCAB}"),
        ({"cache_dtype": "int8"}, "cache_dtype: expected float32 or bfloat16, got 'int8'"),
        (
            {"cache_length": 9},
            tried(
                "{10} slots, but the cache has {9}; raise cache_length, shorten the prompt, or reduce max_new_tokens"
            ),
        ),
        (
            {"buckets": [2, 1]},
            tried("is longer than every bucket of {[2, 1]}; add one of {3} or more to buckets, or shorten the prompt"),
        ),
        ({"buckets": ()}, r"long: a prompt padded to 3 positions is longer than every bucket of \[\]; add one of 3"),
        ({"rows": [1]}, "rows: expected one for each of the 2 rows of the batch, got 1"),
        ({"rows": [1, 2, 3]}, "rows: expected one for each of the 2 rows of the batch, got 3"),
        ({"names": ["short"]}, "names: expected one for each of the 2 rows of the batch, got 1"),
    ],
)
def test_what_cannot_be_generated_is_named(options, message):
    with pytest.raises(GenerationError, match=message):
        run(COUNTING, prompts([1], [1, 2, 3]), **{"names": ["short", "long"], **options})


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"cache_length": 10}, [1, 3]),
        ({"cache_length": 9}, [1, 2]),
        ({"cache_length": 9, "max_new_tokens": 7}, [1, 3]),
        ({"buckets": [2, 1, 3]}, [1, 3]),
        ({"buckets": [2, 1]}, [1, 2]),
    ],
)
def test_what_is_changed_as_said_is_generated(options, lengths):
    rows = [list(range(1, length + 1)) for length in lengths]
    given = {"max_new_tokens": 8, **options}
    assert run(COUNTING, prompts(*rows), **given).lengths.tolist() == [given["max_new_tokens"]] * 2


def test_a_model_without_a_language_model_is_named():
    told = tried(
        "{Dense} has no language model to generate with; use apply() for its outputs, or load a release with one"
    )
    with pytest.raises(GenerationError, match=told):
        run(COUNTING, prompts([1]), nn.Dense(3))
    assert (
        nn.Dense(3).apply({"params": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}}, np.ones(2)).tolist()
        == [2.0] * 3
    )


@pytest.mark.parametrize(("segments", "got"), [([2, 2, 2], "[2]"), ([1, 2, 2], "[1, 2]"), ([0, -1, -1], "[-1, 0]")])
def test_a_row_that_is_not_one_prompt_is_named(segments, got):
    """New tokens are of segment 1, and would read nothing of another one."""
    batch = prompts([1], [1, 2, 3])
    batch.segment_ids[1] = segments
    told = tried("; put each prompt in a separate row, with segment id {1}")
    with pytest.raises(GenerationError, match=rf"long: expected segment ids 0 .* got {re.escape(got)}{told}"):
        run(COUNTING, batch, names=["short", "long"])
    assert run(COUNTING, prompts([1], [1], [2, 3])).lengths.shape == (3,)


def test_a_row_with_branches_is_named():
    """A cache does not know of branches."""
    batch = prompts([1], [1, 2, 3])
    batch = dataclasses.replace(batch, branch_ids=np.asarray([[0, 0, 0], [0, 1, 2]], np.int32))
    with pytest.raises(GenerationError, match=tried("put each branch in a separate row, with branch_ids=None")):
        run(COUNTING, batch, names=["short", "long"])
    separate = dataclasses.replace(prompts([1], [1, 2], [1, 3]), branch_ids=None)
    assert run(COUNTING, separate).lengths.shape == (3,)


def test_what_only_training_reads_stays_on_the_host():
    batch = prompts([1], [1, 2, 3])
    learned = dataclasses.replace(batch, targets=batch.tokens, loss_weights=np.ones(batch.tokens.shape, np.float32))
    whole, _ = fitted(learned, 4, None, None, ["short", "long"])
    assert whole.tokens.shape == (2, 16) and whole.targets is None and whole.loss_weights is None


def test_an_empty_prompt_is_named():
    batch = prompts([1, 2], [3])
    batch.segment_ids[1] = 0
    with pytest.raises(GenerationError, match="row 1: the prompt is empty"):
        run(COUNTING, batch)


def test_prompts_are_padded_to_few_lengths():
    assert [bucket(length) for length in (1, 16, 17, 24, 25, 32, 33, 48, 49, 65, 97, 1000)] == [
        16, 16, 24, 24, 32, 32, 48, 48, 64, 96, 128, 1024,
    ]  # fmt: skip
    assert [bucket(length, [10, 20]) for length in (1, 10, 11)] == [10, 10, 20]


def test_prompts_of_one_bucket_share_two_programs(compiled):
    for length in range(1, 17):
        run(COUNTING, prompts([1] * length), chunk=7)
    assert len(compiled) == 2  # of the prompt and of a chunk
    for length in (17, 24):
        assert run(COUNTING, prompts([1] * length), chunk=7).tokens[0, 0] == 2
    assert len(compiled) == 3  # caches are of one length, and so is the program of a chunk


def test_other_settings_of_the_same_kind_compile_nothing(compiled):
    run(NOISE, prompts([1]), sampling=Sampling(temperature=1.0, top_p=0.5), max_new_tokens=3)
    assert len(compiled) == 2
    run(NOISE, prompts([1]), sampling=Sampling(temperature=0.5, top_p=0.9, seed=9), max_new_tokens=9)
    assert len(compiled) == 2


def test_the_cache_fits_the_prompt_and_all_tokens_but_the_last():
    assert run(COUNTING, prompts([1, 2]), cache_length=9).lengths.tolist() == [8]
