"""Ring attention: every device has a shard of the sequence, and keys and values travel around the mesh axis.

At every step a device adds, by an online softmax, what its queries read of the keys that have arrived, while the next
ones are on their way. The backward pass goes around once more; the gradients of keys and values travel with them and
are home after the last step. Masks are those of `marks`, which travel too, so that a shard does not know its place.

Shards are contiguous: in causal attention the last device has work at every step and the first at one only.

Source: Liu et al. 2023 (Ring Attention with Blockwise Transformers), section 3.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vlm_jax.layers.attention import flash
from vlm_jax.layers.attention.marks import Marks, visible
from vlm_jax.softcap import capped, slope
from vlm_jax.types import Tree

Heads = Float[Array, "B _ _ _"]  # heads first
Sums = Float[Array, "B Q T"]


class Local(Protocol):
    """Attention of one device's queries to some keys."""

    def forward(self, query: Heads, key: Heads, value: Heads, marks: Marks) -> tuple[Heads, Sums]:
        """Float32 outputs, and the logarithms of the sums of exponentials."""
        ...

    def backward(
        self, query: Heads, key: Heads, value: Heads, marks: Marks, logsumexp: Sums, delta: Sums, gradient: Heads
    ) -> tuple[Heads, Heads, Heads]:
        """Float32 gradients of queries, keys and values, given `logsumexp` of all keys; see `flash.backward`."""
        ...


class Kernels(NamedTuple):
    """By our kernel for TPU; `interpret` and `softcap` as in `flash.flash`."""

    interpret: bool
    softcap: float | None = None

    def forward(self, query, key, value, marks):
        return flash.forward(query, key, value, marks, self.interpret, jnp.float32, self.softcap)

    def backward(self, query, key, value, marks, logsumexp, delta, gradient):
        settings = self.interpret, jnp.float32, self.softcap
        return flash.backward(query, key, value, marks, logsumexp, delta, gradient, *settings)


class Products(NamedTuple):
    """Written out: holds the logits of a device's queries and the keys of one step; `softcap` as in `Context`."""

    softcap: float | None = None

    def forward(self, query, key, value, marks):
        logits = capped(_dot("bkgth,bksh->bkgts", _grouped(query, key), key), self.softcap)
        logits = jnp.where(_reads(marks), logits, flash.MASKED)
        highest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - highest)
        sums = weights.sum(-1, keepdims=True)
        out = _dot("bkgts,bksh->bkgth", weights.astype(value.dtype), value) / sums
        shape = query.shape[:3]
        return out.reshape(*shape, -1), (highest + jnp.log(sums)).reshape(shape)

    def backward(self, query, key, value, marks, logsumexp, delta, gradient):
        grouped, of_out = _grouped(query, key), _grouped(gradient, key)
        rows = (*grouped.shape[:4], 1)
        logits = capped(_dot("bkgth,bksh->bkgts", grouped, key), self.softcap)
        weights = jnp.where(_reads(marks), jnp.exp(logits - logsumexp.reshape(rows)), 0.0)
        error = weights * (_dot("bkgth,bksh->bkgts", of_out, value) - delta.reshape(rows)) * slope(logits, self.softcap)
        error, weights = error.astype(query.dtype), weights.astype(gradient.dtype)
        of_query = _dot("bkgts,bksh->bkgth", error, key).reshape(query.shape)
        return of_query, _dot("bkgts,bkgth->bksh", error, grouped), _dot("bkgts,bkgth->bksh", weights, of_out)


class Ring(NamedTuple):
    """The devices of a ring.

    Attributes:
      axis: the mesh axis.
      size: devices on it.
      local: what a device computes at every step.
    """

    axis: str
    size: int
    local: Local

    def pass_on(self, arrays: Tree) -> Tree:
        """Sends arrays to the next device and receives those of the one before."""
        pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring(query: Heads, key: Heads, value: Heads, marks: Marks, over: Ring) -> Heads:
    """Attention of scaled queries to the keys of all devices of the ring; for use inside a `jax.shard_map`.

    Args:
      query: this device's queries [B, Q, T, H], multiplied by the scale of the logits.
      key: its keys [B, K, S, H]; K divides Q.
      value: its values.
      marks: of its queries and keys, numbered in the whole sequence.
      over: the ring.
    """
    return _forward(query, key, value, marks, over)[0]


def _forward(query: Heads, key: Heads, value: Heads, marks: Marks, over: Ring) -> tuple[Heads, Tree]:
    shape = query.shape[:3]
    found = jnp.zeros((*shape, value.shape[3]), jnp.float32), jnp.full(shape, flash.MASKED, jnp.float32)

    def add(found: Tree, arrived: Tree) -> Tree:
        key, value, of_key = arrived
        out, logsumexp = over.local.forward(query, key, value, Marks(marks.query, of_key))
        total = jnp.logaddexp(found[1], logsumexp)
        before, now = (jnp.exp(x - total)[..., None] for x in (found[1], logsumexp))
        return found[0] * before + out * now, total

    def step(carry: Tree, _: None) -> tuple[Tree, None]:
        found, arrived = carry
        following = over.pass_on(arrived)
        return (add(found, arrived), following), None

    (found, arrived), _ = lax.scan(step, (found, (key, value, marks.key)), length=over.size - 1)
    out, logsumexp = add(found, arrived)
    out = out.astype(query.dtype)
    return out, (query, key, value, marks, out, logsumexp)


def _backward(over: Ring, saved: Tree, gradient: Heads) -> tuple[Heads, Heads, Heads, None]:
    query, key, value, marks, out, logsumexp = saved
    delta = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))

    def add(totals: Tree, arrived: Tree) -> Tree:
        key, value, of_key = arrived
        marked = Marks(marks.query, of_key)
        parts = over.local.backward(query, key, value, marked, logsumexp, delta, gradient)
        return jax.tree.map(jnp.add, totals, tuple(parts))

    def step(carry: Tree, _: None) -> tuple[Tree, None]:
        totals, arrived = carry
        following = over.pass_on(arrived)
        of_query, *others = add(totals, arrived)
        return ((of_query, *over.pass_on(tuple(others))), following), None

    (totals, arrived), _ = lax.scan(step, (start, (key, value, marks.key)), length=over.size - 1)
    of_query, *others = add(totals, arrived)
    of_key, of_value = over.pass_on(tuple(others))
    return of_query.astype(query.dtype), of_key.astype(key.dtype), of_value.astype(value.dtype), None


ring.defvjp(_forward, _backward)


def _dot(product: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(product, *arrays, preferred_element_type=jnp.float32)


def _grouped(x: Heads, key: Heads) -> Float[Array, "B K G T H"]:
    return x.reshape(x.shape[0], key.shape[1], -1, *x.shape[2:])


def _reads(marks: Marks) -> Array:
    queries = (marks.query[:, n, :, None] for n in range(4))
    keys = (marks.key[:, n, None] for n in range(4))
    return visible(*queries, *keys)[:, None, None]
