"""The gated delta rule: a matrix of memory per head, which decays and is corrected at every token.

At a token with query q, key k, value v, rate b and log decay g:

    memory = exp(g) * memory
    memory = memory + b * outer(k, v - k @ memory)
    output = q @ memory

`step` does this for one token, `chunked` for many: by products of matrices inside a chunk, by a scan over chunks.

Source: Yang et al. 2025 (Gated DeltaNet), sections 3.1 and 3.3; Yang et al. 2024 (DeltaNet), section 3.2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.types import PADDING_SEGMENT

CHUNK = 64  # tokens of a chunk at most; a power of 2


class Lineages(NamedTuple):
    """Which earlier tokens are in the memory that a token reads; padding is at the end of a row.

    Attributes:
      runs: number of the token's segment in its row, where 0 is the segment of the tokens before the row.
      branches: branch ids, 0 for padding: a token reads branch 0 and its own one, whose tokens are consecutive among
        those of other branches than 0. What tokens of branch 0 write never depends on another branch, even if they come
        after it. None where there is one branch.
    """

    runs: Int[Array, "B T"]
    branches: Int[Array, "B T"] | None

    @classmethod
    def of(
        cls, segments: Int[Array, "B T"], held: Int[Array, "B"], branches: Int[Array, "B T"] | None = None
    ) -> "Lineages":
        """Of segments, whose tokens are consecutive, after one that is `held` (0 for none)."""
        real = segments != PADDING_SEGMENT
        count = jnp.sum(real, axis=1, keepdims=True)
        last = jnp.take_along_axis(segments, jnp.maximum(count - 1, 0), axis=1)
        filled = jnp.where(real, segments, jnp.where(count == 0, held[:, None], last))
        before = jnp.concatenate([held[:, None], filled[:, :-1]], axis=1)
        runs = jnp.cumsum(filled != before, axis=1)
        return cls(runs, None if branches is None else jnp.where(real, branches, 0))

    def padded(self, size: int) -> "Lineages":
        """Those of a row to whose end padding is added, so that `size` divides it."""
        branches = None if self.branches is None else _whole(self.branches, size)
        return Lineages(_whole(self.runs, size, "edge"), branches)

    def masks(self, size: int) -> "Masks":
        """The masks of chunks of `size` tokens, which must divide the row."""
        runs = self.runs.reshape(self.runs.shape[0], -1, size)
        before, now = _at_ends(runs)
        causal = jnp.tri(size, dtype=bool)[None, None]
        sees = causal & (runs[..., :, None] == runs[..., None, :])
        starts, ends, carried = runs == before[..., None], runs == now[..., None], now == before
        if self.branches is None:
            return Masks(sees, starts[:, :, None], ends[:, :, None], carried[:, :, None, None])
        branches = self.branches.reshape(runs.shape)
        shared = branches == 0
        sees &= shared[..., None, :] | (branches[..., None, :] == branches[..., :, None])
        # The memory is kept twice: of branch 0, and of the last other branch.
        old, new = (last[..., None] for last in _at_ends(self._last_branches().reshape(runs.shape)))
        own = ~shared & (branches == old)
        same = (old == new)[..., 0]
        none = jnp.zeros_like(carried)
        rows = (carried, none), (carried & ~same, carried & same)
        return Masks(
            sees,
            jnp.stack([starts & ~own, starts & own], axis=2),
            jnp.stack([ends & shared, ends & (shared | (branches == new))], axis=2),
            jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=2),
        )

    def earlier(self, count: int) -> Int[Array, "W B T"]:
        """Indices of the last W = `count` tokens that each token reads before itself, oldest first; -1 for none.

        Raises:
          ValueError: there are no branches: these are then the tokens just before it.
        """
        if self.branches is None:
            raise ValueError("branches: expected an id of every token, got None, where the tokens just before are read")
        number = jnp.arange(self.runs.shape[1])[None]
        shared, others = (
            jax.lax.cummax(jnp.where(mask, number, -1), axis=1) for mask in (self.branches == 0, self.branches != 0)
        )

        def at(ids: jax.Array, index: jax.Array) -> jax.Array:
            return jnp.where(index < 0, -1, jnp.take_along_axis(ids, jnp.maximum(index, 0), axis=1))

        index, found = jnp.broadcast_to(number, self.runs.shape), []
        for _ in range(count):
            own = at(others, index - 1)
            own = jnp.where(at(self.branches, own) == self.branches, own, -1)
            index = jnp.maximum(at(shared, index - 1), own)
            index = jnp.where(at(self.runs, index) == self.runs, index, -1)
            found.append(index)
        return jnp.stack(found[::-1]) if found else jnp.zeros((0, *self.runs.shape), jnp.int32)

    def _last_branches(self) -> Int[Array, "B T"]:
        """The last branch other than 0 in each token's segment, up to the token; 0 where there is none."""
        assert self.branches is not None
        index = jnp.where(self.branches != 0, jnp.arange(self.runs.shape[1])[None], -1)
        index = jax.lax.cummax(index, axis=1)
        at = jnp.maximum(index, 0)
        found, runs = (jnp.take_along_axis(ids, at, axis=1) for ids in (self.branches, self.runs))
        return jnp.where((index >= 0) & (runs == self.runs), found, 0)


class Masks(NamedTuple):
    """Who reads whom in chunks of C tokens, with M kept memories: 1, or 2 where there are branches.

    Attributes:
      sees: whether a token reads another of its chunk, itself included.
      starts: whether a token reads a memory from before its chunk.
      ends: whether a token is in a memory after its chunk.
      carries: whether a memory after a chunk continues one from before it.
    """

    sees: Bool[Array, "B N C C"]
    starts: Bool[Array, "B N M C"]
    ends: Bool[Array, "B N M C"]
    carries: Bool[Array, "B N M M"]


def step(
    query: Float[Array, "B 1 G K"],
    key: Float[Array, "B 1 G K"],
    value: Float[Array, "B 1 H V"],
    rate: Float[Array, "B 1 H"],
    decay: Float[Array, "B 1 H"],
    memory: Float[Array, "B H K V"],
    lineages: Lineages,
) -> tuple[Float[Array, "B 1 H V"], Float[Array, "B H K V"]]:
    """One token after a memory; arguments and results as of `chunked`."""
    query, key = (jnp.repeat(x[:, 0], value.shape[2] // x.shape[2], axis=1)[..., None] for x in (query, key))
    kept = jnp.where(lineages.runs[:, :1] == 0, jnp.exp(decay[:, 0]), 0.0)
    memory = memory * kept[..., None, None]
    change = rate[:, 0, :, None] * (value[:, 0] - jnp.sum(memory * key, axis=-2))
    memory = memory + key * change[..., None, :]
    return jnp.sum(memory * query, axis=-2)[:, None], memory


# What a chunk needs is recomputed in the backward pass, which stores only the inputs.
@functools.partial(jax.checkpoint, prevent_cse=False)
def chunked(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    rate: Float[Array, "B T H"],
    decay: Float[Array, "B T H"],
    memory: Float[Array, "B H K V"] | None,
    lineages: Lineages,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs T tokens; all arrays are float32.

    Args:
      query: scaled queries; each of G heads serves H / G consecutive ones of the values.
      key: keys of at most unit length.
      value: values.
      rate: b of every token, 0 to 1; 0 for padding.
      decay: g of every token, at most 0; 0 for padding.
      memory: from before the first token; zeros when None.
      lineages: who reads whom.

    Returns:
      The output, and the memory of branch 0 after the last token.
    """
    batch, length, heads, value_dim = value.shape
    size = min(CHUNK, 1 << (length - 1).bit_length())
    query, key = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (query, key))
    query, key, value, rate, decay = (_in_chunks(x, size) for x in (query, key, value, rate, decay))
    masks = lineages.padded(size).masks(size)
    pairs, since_start, to_end, over = _log_decays(decay, masks)
    decays = jnp.exp(jnp.where(masks.sees[:, :, None], pairs, -jnp.inf))
    products = rate[..., None] * decays * jnp.einsum("bnhik,bnhjk->bnhij", key, key)
    inverse = inverted(products * jnp.tri(size, k=-1)[None, None, None])
    # Of tokens before the chunk, by memory: what tokens correct, what they read; and what memories take up.
    starts = (masks.starts[:, :, :, None] * jnp.exp(since_start)[:, :, None])[..., None]
    corrected = inverse[:, :, None] @ (rate[:, :, None, ..., None] * starts * key[:, :, None])
    read = starts * query[:, :, None]
    taken = (masks.ends[:, :, :, None] * jnp.exp(to_end))[..., None] * key[:, :, None]
    carried = masks.carries[..., None] * jnp.exp(over)[:, :, :, None]
    written = inverse @ (rate[..., None] * value)
    attended = decays * jnp.einsum("bnhik,bnhjk->bnhij", query, key)

    def chunk(memory: jax.Array, of_chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        corrected, read, taken, carried, written, attended = of_chunk
        written = written - jnp.einsum("bmhck,bmhkv->bhcv", corrected, memory)
        out = jnp.einsum("bmhck,bmhkv->bhcv", read, memory) + attended @ written
        kept = jnp.sum(carried[..., None, None] * memory[:, None], axis=2)
        return kept + jnp.einsum("bmhck,bhcv->bmhkv", taken, written), out

    shape = (batch, masks.starts.shape[2], heads, key.shape[-1], value_dim)
    memories = jnp.zeros(shape, jnp.float32) if memory is None else jnp.broadcast_to(memory[:, None], shape)
    chunks = (jnp.moveaxis(x, 1, 0) for x in (corrected, read, taken, carried, written, attended))
    memories, out = jax.lax.scan(chunk, memories, tuple(chunks))
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, -1, heads, value_dim)[:, :length]
    return out, memories[:, 0]


def inverted(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """The inverse of I + `lower`, which is strictly lower triangular; C is a power of 2.

    By blocks of doubled size, whose lower left part is -(inverse of the second half) @ part @ (inverse of the first):
    as exact as forward substitution, in 2 log2(C) - 2 products.
    """
    size = lower.shape[-1]
    number, found = jnp.arange(size), jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    width = 1
    while width < size:
        block = number // width
        pairs = (block[:, None] % 2 == 1) & (block[:, None] == block[None] + 1)
        part = lower * pairs.reshape((1,) * (lower.ndim - 2) + pairs.shape)
        if width > 1:
            part = jnp.matmul(jnp.matmul(found, part, precision="high"), found, precision="high")
        found, width = found - part, 2 * width
    return found


def _log_decays(decay: Float[Array, "B N H C"], masks: Masks) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sums of log decays over the tokens that are read.

    Returns:
      Between two tokens of a chunk, without the earlier and with the later [B, N, H, C, C]; from the start of a chunk
      to each token [B, N, H, C]; from each token, without it, to the end, for each memory [B, N, M, H, C]; and over
      the chunk, for each memory [B, N, M, H].
    """
    if masks.starts.shape[2] == 1:
        total = jnp.cumsum(decay, axis=-1)
        last = total[..., -1:]
        return total[..., :, None] - total[..., None, :], total, (last - total)[:, :, None], last[:, :, None, :, 0]
    later = jnp.tri(decay.shape[-1], k=-1)
    of_tokens = decay[..., None, :] * masks.sees[:, :, None]
    of_ends = decay[:, :, None] * masks.ends[:, :, :, None]
    pairs, to_end = (jnp.matmul(x, later, precision="highest") for x in (of_tokens, of_ends))
    return pairs, of_tokens.sum(axis=-1), to_end, of_ends.sum(axis=-1)


def _whole(x: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """`x` with positions added so that `size` divides their number."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), mode=mode)


def _in_chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, H, ..] as [B, N, H, C, ..]."""
    x = _whole(x, size)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 2, 3)


def _at_ends(ids: Int[Array, "B N C"]) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """The ids before the first token of every chunk, which are 0 before a row, and those of its last token."""
    now = ids[..., -1]
    return jnp.pad(now[:, :-1], ((0, 0), (1, 0))), now
