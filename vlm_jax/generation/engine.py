"""Generation: a program for the prompt, and one for a chunk of new tokens, whose loop runs on the device.

The host receives new tokens once per chunk, in one array. A row ends at an end token, where the host
ends it (a stop string), or at the maximum length; the loop ends when all rows have ended.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.decoders.cache import KINDS, Cache
from vlm_jax.decoders.decoder import Decoder
from vlm_jax.generation.buckets import fitted, whole_rows
from vlm_jax.generation.repeats import Repeats, repeats_of
from vlm_jax.generation.sampling import GenerationError, Sampling, Whole, row_values, sample_tokens
from vlm_jax.layers.per_layer import layers_apart
from vlm_jax.layers.platform import platform
from vlm_jax.models.vlm import without_masked
from vlm_jax.sharding.mesh import CONTEXT
from vlm_jax.sharding.processes import to_host
from vlm_jax.sharding.rules import partition_spec, use_mesh
from vlm_jax.types import PADDING_SEGMENT, Batch, Dtype, Params, Positions, Tree, struct

MAX_TOKENS = 1 << 24  # of an answer, far above any model's positions
CACHE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_REPORTED = 4  # columns of a report after its tokens
SOUND = -1  # the step of a row whose logits are not known to be NaN

# New tokens of every row, and the number that are valid -> the rows to end.
Watch = Callable[[Int[np.ndarray, "B N"], Int[np.ndarray, "B"]], Bool[np.ndarray, "B"]]


@runtime_checkable
class Generative(Protocol):
    """A model that `generate` can run; see `models.vlm.VLM`."""

    @property
    def decoder(self) -> Decoder | None: ...

    def prefill(self, batch: Batch, cache_length: int, cache_dtype: Dtype = None) -> tuple[Float[Array, "B V"], Cache]:
        """Runs prompts; logits of the last token of every row, and the cache."""
        ...

    def extend(
        self, tokens: Int[Array, "B T"], positions: Positions, cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Runs tokens after the cache; logits of the last."""
        ...


@dataclasses.dataclass(frozen=True)
class Generated:
    """New tokens of a batch.

    Attributes:
      tokens: new tokens of every row, including its end token; then `pad_id`.
      lengths: number of valid tokens per row.
      steps: runs of the model after the prompt.
      transfers: number of arrays copied to the host.
      prompt_lengths: unpadded positions of every prompt, in the first layers and after each drop of visual tokens.
    """

    tokens: Int[np.ndarray, "B G"]
    lengths: Int[np.ndarray, "B"]
    steps: int
    transfers: int
    prompt_lengths: Int[np.ndarray, "B spans"] | None = None


@struct
class State:
    """The state between chunks.

    Attributes:
      cache: keys and values of all tokens but the newest.
      token: the newest token of every row.
      position: its position, on one axis or three.
      ended: rows that have ended.
      nan_step: index of the token whose logits were NaN, -1 where there was none or the row ended before it.
      step: number of tokens chosen.
      rows: seeds of the rows' random numbers.
      seen: tokens that occur in a row, only for the repetition penalty.
      repeats: tokens of a row, only where no n-gram is repeated.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"] | Int[Array, "B 3"]
    ended: Bool[Array, "B"]
    nan_step: Int[Array, "B"]
    step: Int[Array, ""]
    rows: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    repeats: Repeats | None = None


def generate(
    model: nn.Module,
    params: Params,
    batch: Batch,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    pad_id: int = 0,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    chunk: int = 32,
    cache_dtype: str | None = None,
    cache_length: int | None = None,
    buckets: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
    on_prompts: Callable[[Int[np.ndarray, "B spans"]], None] | None = None,
    on_nan: Callable[[int, GenerationError], None] | None = None,
    mesh: Mesh | None = None,
) -> Generated:
    """New tokens for every prompt of a batch.

    Args:
      model: has `prefill`, `extend` and `decoder` as `models.vlm.VLM`.
      params: its parameters; other parts in the tree are ignored.
      batch: prompts, padded on the left or on the right.
      max_new_tokens: G, the maximum number of tokens of an answer, including its end token.
      end_ids: tokens that end a row.
      pad_id: pads a row after its end.
      sampling: sampling settings of all rows, or of each; see `sampling.row_values`.
      chunk: the maximum number of tokens between two reports to the host.
      cache_dtype: float32 or bfloat16; the decoder's own dtype when None.
      cache_length: slots of the cache; as many as needed when None.
      buckets: lengths to which prompts are padded, so that few programs are compiled; see `buckets.bucket`.
      rows: seeds of the rows' random numbers, 0, 1, 2 … when None: a prompt with the same seed gives the same
        tokens in any batch.
      names: names of the rows in errors.
      watch: called with the new tokens after every chunk, may end rows; NaN after such an end is no error.
      on_prompts: called with `Generated.prompt_lengths` before the first tokens are watched.
      on_nan: called with a row whose logits are NaN, which then ends while the others go on; when None, that is an
        error.
      mesh: mesh of the parameters: rows are sharded over its data axes, heads of the
        cache over its tensor axis.

    Raises:
      GenerationError: a prompt that does not fit, a setting outside its range, an end token outside the
        vocabulary, or logits that are NaN.
    """
    size = len(batch.tokens)
    _check(model, max_new_tokens, end_ids, chunk, cache_dtype, mesh)
    each = None if isinstance(sampling, Sampling) else sampling
    check_lengths(size, rows=rows, names=names, sampling=each)
    names = [f"row {row}" for row in range(size)] if names is None else names
    batch, cache_length = fitted(batch, max_new_tokens, cache_length, buckets, names)
    batch, extra = whole_rows(batch, mesh)
    numbers = np.asarray([*(range(size) if rows is None else rows), *[0] * extra], np.int32)
    given = placed((batch, numbers, np.arange(size + extra) >= size), mesh)
    ends = np.asarray(sorted(set(end_ids)), np.int32)
    values = sampling.values() if isinstance(sampling, Sampling) else row_values(sampling, size + extra)
    variables = {"params": prepared(params, mesh)}
    limit, static = np.int32(max_new_tokens), {"model": model, "pad_id": pad_id}
    tokens = np.full((size, max_new_tokens), pad_id, np.int32)
    lengths, transfers, prompt_lengths = np.zeros(size, np.int32), 0, None
    with use_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        state, report = prefill(
            variables, *given, values, ends, cache_length=cache_length, cache_dtype=cache_dtype, mesh=mesh, **static
        )
        while True:
            found = to_host(report)
            if prompt_lengths is None:
                found, prompt_lengths = np.split(found, [1 + _REPORTED], axis=1)
                if on_prompts is not None:
                    on_prompts(prompt_lengths[:size])
            new, counts, ended, nan_step, step = _read(found, size)
            nan = nan_step != SOUND
            counts = counts - nan  # tokens from NaN on are invalid
            stopping = np.zeros(size, bool) if watch is None else watch(new, counts)
            for row in np.flatnonzero(nan & ~stopping).tolist():
                error = GenerationError(
                    f"{names[row]}: the logits of its new token {nan_step[row]} (from 0) are NaN; check the "
                    "parameters and the images for NaN, or compute in float32"
                )
                if on_nan is None:
                    raise error
                on_nan(row, error)
            stopping = stopping | nan
            for row, count in enumerate(counts):
                tokens[row, lengths[row] : lengths[row] + count] = new[row, :count]
            lengths, transfers = lengths + counts, transfers + 1
            if (stopping & (nan | ~ended)).any():
                ended = ended | stopping
                whole = np.concatenate([ended, np.ones(extra, bool)]), np.full(size + extra, SOUND, np.int32)
                all_ended, nan_steps = placed(whole, mesh)
                state = dataclasses.replace(state, ended=all_ended, nan_step=nan_steps)
            if ended.all() or lengths.max() == max_new_tokens:
                return Generated(tokens, lengths, step - 1, transfers, prompt_lengths[:size])
            state, report = decode(variables, state, values, ends, limit, chunk=chunk, **static)


def prepared(params: Params, mesh: Mesh | None = None) -> Params:
    """Parameters in the layout that `generate` needs on this platform, for callers that generate more than once.

    On a CPU the decoder's layers are copied out of their stacks; elsewhere, and on a mesh, parameters are unchanged.
    """
    if mesh is not None or platform() != "cpu":
        return params
    return {name: layers_apart(part) if name == "decoder" else part for name, part in params.items()}


@partial(jax.jit, static_argnames=("model", "pad_id", "cache_length", "cache_dtype", "mesh"))
def prefill(variables, batch, rows, ended, values, ends, *, model, pad_id, cache_length, cache_dtype, mesh):
    """Runs the prompts; the state after their first new tokens, and the first report with each span's positions."""
    dtype = None if cache_dtype is None else CACHE_DTYPES[cache_dtype]
    logits, cache = model.apply(variables, batch, cache_length, dtype, method="prefill")
    if mesh is not None:
        cache = _laid_out(cache, mesh)
    segments = cache.segment_ids[:, : batch.tokens.shape[1]]
    positions = without_masked(batch, segments)
    flat = positions if positions.ndim == 2 else positions.max(axis=-1)
    last = jnp.max(jnp.where(segments == PADDING_SEGMENT, -1, flat), axis=1)
    if batch.visual_positions is not None:  # a prompt may end with an image whose last tokens are dropped
        visual = batch.visual_positions
        last = jnp.maximum(last, jnp.max(visual if visual.ndim == 2 else visual.max(axis=-1), axis=1, initial=-1))
    size, seen = len(batch.tokens), None
    if "repetition_penalty" in values:
        index = jnp.where(batch.segment_ids == PADDING_SEGMENT, logits.shape[-1], batch.tokens)
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(size)[:, None], index].set(True, mode="drop")
    repeats = None
    if "no_repeat_ngram" in values:
        real = jnp.asarray(batch.segment_ids) != PADDING_SEGMENT
        repeats = repeats_of(batch.tokens, real, cache_length - batch.tokens.shape[1] + 1)
    state = State(
        cache=cache,
        token=jnp.zeros(size, jnp.int32),
        position=last if positions.ndim == 2 else jnp.broadcast_to(last[:, None], (size, positions.shape[-1])),
        ended=ended,
        nan_step=jnp.full(size, SOUND),
        step=jnp.zeros((), jnp.int32),
        rows=rows,
        seen=seen,
        repeats=repeats,
    )
    going = ~ended
    state = _chosen(state, logits, values, ends, pad_id)
    spans = jnp.stack([jnp.sum(part.segment_ids != PADDING_SEGMENT, axis=1) for part in cache.parts], axis=1)
    report = _report(state.token[:, None], going.astype(jnp.int32), state)
    return state, jnp.concatenate([report, spans], axis=1)


@partial(jax.jit, static_argnames=("model", "pad_id", "chunk"), donate_argnames=("state",))
def decode(variables, state, values, ends, limit, *, model, pad_id, chunk):
    """Up to `chunk` more tokens, `limit` in total; the state after them, and their report."""
    size = len(state.token)

    def going_on(carry):
        column, state, _, _ = carry
        sound = (state.nan_step == SOUND).all()
        return (column < chunk) & (state.step < limit) & ~state.ended.all() & sound

    def step_on(carry):
        column, state, tokens, counts = carry
        inputs = state.token[:, None], state.position[:, None], state.cache
        logits, cache = model.apply(variables, *inputs, method="extend")
        counts = counts + ~state.ended
        state = _chosen(dataclasses.replace(state, cache=cache), logits, values, ends, pad_id)
        tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], (0, column))
        return column + 1, state, tokens, counts

    tokens = jnp.full((size, chunk), pad_id, jnp.int32)
    start = (jnp.zeros((), jnp.int32), state, tokens, jnp.zeros(size, jnp.int32))
    _, state, tokens, counts = jax.lax.while_loop(going_on, step_on, start)
    return state, _report(tokens, counts, state)


def _chosen(state: State, logits: jax.Array, values: Tree, ends: jax.Array, pad_id: int) -> State:
    """The state with one more token per row."""
    allowed, repeats = logits, state.repeats
    if repeats is not None:
        settings = values["no_repeat_ngram"], values["no_repeat_window"]
        out = repeats.excluded(*settings, logits.shape[-1], values.get("no_repeat_except"))
        allowed = jnp.where(out, -jnp.inf, logits)
    token = sample_tokens(allowed, values, state.seen, state.rows, state.step)
    token = jnp.where(state.ended, pad_id, token)
    if repeats is not None:
        repeats = repeats.followed_by(token, ~state.ended)
    nan = jnp.isnan(logits).any(axis=-1) & ~state.ended
    seen = state.seen if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    return dataclasses.replace(
        state,
        token=token,
        position=state.position + 1,
        ended=state.ended | (token[:, None] == ends[None]).any(axis=-1),
        nan_step=jnp.where(nan, state.step, state.nan_step),
        step=state.step + 1,
        seen=seen,
        repeats=repeats,
    )


def _report(tokens: jax.Array, counts: jax.Array, state: State) -> jax.Array:
    """The report to the host, as one array."""
    step = jnp.broadcast_to(state.step, counts.shape)
    rest = jnp.stack([counts, state.ended.astype(jnp.int32), state.nan_step, step], axis=1)
    return jnp.concatenate([tokens, rest], axis=1)


def _read(report: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Tokens, counts, ended rows and NaN steps of the first `size` rows, and the number of steps."""
    report = report[:size]
    return report[:, :-_REPORTED], report[:, -4], report[:, -3] != 0, report[:, -2], int(report[0, -1])


def _laid_out(cache: Cache, mesh: Mesh) -> Cache:
    """The cache sharded like the model's activations and heads."""
    return jax.tree.map(jax.lax.with_sharding_constraint, cache, cache_shardings(cache, mesh))


def cache_shardings(cache: Cache, mesh: Mesh) -> Tree:
    """A sharding for every array of a cache, or of its shapes, like those of the model's activations and heads."""

    def is_kept(node: Tree) -> bool:
        return isinstance(node, KINDS)

    found = []
    for node in jax.tree.leaves(cache, is_leaf=is_kept):
        of_node = zip(node, node.AXES, strict=True) if is_kept(node) else [(node, (axes.BATCH, None)[: node.ndim])]
        found += [NamedSharding(mesh, partition_spec(names, leaf.shape, mesh)) for leaf, names in of_node]
    return jax.tree.unflatten(jax.tree.structure(cache), found)


def placed(tree: Tree, mesh: Mesh | None) -> Tree:
    """Puts arrays with a leading batch axis on the mesh, or on the default device."""
    if mesh is None:
        return jax.device_put(tree)

    def put(leaf):
        names = (axes.BATCH, *[None] * (np.ndim(leaf) - 1))
        return jax.device_put(leaf, NamedSharding(mesh, partition_spec(names, np.shape(leaf), mesh)))

    return jax.tree.map(put, tree)


def _check(
    model: nn.Module,
    max_new_tokens: int,
    end_ids: Sequence[int],
    chunk: int,
    cache_dtype: str | None,
    mesh: Mesh | None,
) -> None:
    """Raises a GenerationError that lists every setting outside its range."""
    vocab = check_generative(model)
    wrong = []
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if isinstance(value, bool) or not isinstance(value, Whole) or value < 1:
            wrong.append(f"{name}: expected 1 or more, got {value!r}")
        elif value > MAX_TOKENS:
            wrong.append(f"{name}: expected at most {MAX_TOKENS}, got {value}")
    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        wrong.append(f"cache_dtype: expected {' or '.join(CACHE_DTYPES)}, got {cache_dtype!r}")
    wrong += [f"end_ids: expected 0 to {vocab - 1}, got {index}" for index in end_ids if not 0 <= index < vocab]
    if mesh is not None and mesh.shape[CONTEXT] > 1:
        wrong.append(f"mesh: generation does not shard the sequence; expected {CONTEXT}=1, got {mesh.shape[CONTEXT]}")
    if wrong:
        raise GenerationError("\n".join(wrong))


def check_generative(model: nn.Module) -> int:
    """The size of a model's vocabulary; raises a GenerationError for a model without a language model."""
    if not isinstance(model, Generative) or model.decoder is None:
        raise GenerationError(
            f"{type(model).__name__} has no language model to generate with; use apply() for its outputs, or "
            "load a release with one"
        )
    return model.decoder.vocab_size


def check_lengths(size: int, **given: Sequence[object] | None) -> None:
    """Raises a GenerationError for a per-row setting without one entry per row."""
    for name, values in given.items():
        if values is not None and len(values) != size:
            raise GenerationError(f"{name}: expected one for each of the {size} rows of the batch, got {len(values)}")
