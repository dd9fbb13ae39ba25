"""Log-likelihoods of continuations: how probable a model finds a text after a prompt."""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.generation.buckets import bucket, lengthened, whole_rows
from vlm_jax.generation.engine import check_generative, check_lengths, placed, prepared
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.models.vlm import VLM
from vlm_jax.sharding.processes import to_host
from vlm_jax.sharding.rules import use_mesh
from vlm_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How probable a continuation is.

    Attributes:
      log_likelihood: sum of the log probabilities of its tokens, nats.
      is_greedy: whether each of its tokens is the most likely one after those before it.
      num_tokens: of the continuation, so that its perplexity is exp(-log_likelihood / num_tokens).
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int


def log_likelihoods(
    model: nn.Module,
    params: Params,
    batch: Batch,
    *,
    buckets: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> list[Likelihood]:
    """The likelihood of each row's tokens with loss weight, given all tokens before them.

    One run of the model on whole rows. Visual tokens that a decoder drops are ranked by the end of the prompt, as in
    generation.

    Args:
      model: a `VLM` with a decoder.
      params: its parameters, or the result of `engine.prepared`.
      batch: prompts with their continuations, of `Processor.batch` with `continuations`.
      buckets: lengths to which rows are padded, so that few programs are compiled; see `buckets.bucket`.
      names: names of the rows in errors.
      mesh: mesh of the parameters, over whose data axes rows are sharded.

    Raises:
      GenerationError: a model without a decoder, a row without a continuation, or logits that are NaN.
    """
    size = len(batch.tokens)
    check_generative(model)
    check_lengths(size, names=names)
    names = [f"row {row}" for row in range(size)] if names is None else names
    if batch.loss_weights is None:
        raise GenerationError("expected a batch with continuations; pass them to Processor.batch")
    learned = np.asarray(batch.loss_weights) > 0
    counts = learned.sum(axis=1)
    for row in np.flatnonzero(counts == 0).tolist():
        raise GenerationError(f"{names[row]}: the continuation has no token; expected a text of at least one")
    length = bucket(learned.shape[1], buckets, names[int(np.argmax(counts))])
    places = np.argsort(~learned, axis=1, kind="stable")[:, : bucket(int(counts.max()))]
    batch, extra = whole_rows(lengthened(batch, length), mesh)
    places = np.concatenate([places, *[places[-1:]] * extra]).astype(np.int32)
    given = placed((batch, places), mesh)
    variables = {"params": prepared(params, mesh)}
    with use_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        scores = to_host(_scores(variables, *given, model=model))
    found = []
    for name, count, (log_probs, is_best) in zip(names, counts.tolist(), scores[:size], strict=True):
        own = np.asarray(log_probs[:count], np.float64)
        if np.isnan(own).any():
            raise GenerationError(
                f"{name}: the likelihood of its continuation is NaN; check the images and the parameters for NaN, or "
                "compute in float32"
            )
        found.append(Likelihood(float(own.sum()), bool(is_best[:count].all()), count))
    return found


@partial(jax.jit, static_argnames=("model",))
def _scores(variables, batch, places, *, model):
    """[B, 2, N]: of the tokens behind N places the log probability, and 1 where no other is more likely."""
    logits = model.apply(variables, batch, places, method=_logits_at)
    targets = jnp.take_along_axis(jnp.asarray(batch.targets), places, axis=1)[..., None]
    own = jnp.take_along_axis(logits, targets, axis=-1)
    log_probs = own[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.stack([log_probs, jnp.argmax(logits, axis=-1) == targets[..., 0]], axis=1)


def _logits_at(model: VLM, batch: Batch, places: jax.Array) -> jax.Array:
    """Float32 logits at some positions of every row."""
    assert model.decoder is not None
    hidden = jnp.take_along_axis(model.hidden(batch), places[..., None], axis=1)
    return model.decoder.logits(hidden)
