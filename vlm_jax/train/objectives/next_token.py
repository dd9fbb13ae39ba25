"""The cross entropy of answers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.build import CELL_HEAD, AnyExperiment
from vlm_jax.config import check_fields
from vlm_jax.decoders.decoder import HeadKernel
from vlm_jax.layers.scan import LOSSES
from vlm_jax.losses.cross_entropy import head_cross_entropy
from vlm_jax.losses.vocabulary_blocks import Blocks
from vlm_jax.ranges import Bytes, NonNegative
from vlm_jax.sharding.rules import MeshAxes, partition_spec
from vlm_jax.train.objectives.objective import Loss, Metrics, Objective, of_conversations
from vlm_jax.types import PADDING_SEGMENT, Batch, Params, Tree

# Logits that a device holds at once, but at least MIN_IDS ids at each of its positions. Fewer bytes save none: blocks
# hold the gradient of the whole kernel beside them, and compute logits twice.
LOGITS_BYTES = 128 * 2**20
MIN_IDS = 512  # narrower products would take longer to add than to compute


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Cross entropy of the answers' tokens, given images (or only text) and questions.

    What modules sow into the collection `losses`, such as a router's balance loss, is added to it. The metric
    `padding_share` is the share of the rows' positions that are padding; `z_loss` is in the metrics where it is on.

    Attributes:
      z_loss: weight of the mean squared logsumexp of the logits; 1e-4 in PaLM.
      logits_bytes: bound of the float32 logits that a device holds at once, in bytes; None for `LOGITS_BYTES`.
    """

    z_loss: NonNegative = 0.0
    logits_bytes: Bytes | None = None

    streams: ClassVar[tuple[str, ...]] = ("questions", "text_pages", "fine_text_pages")
    packs: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self, "")

    def check(self, experiment: AnyExperiment, *, accumulate: int, path: str) -> None:
        """Refuses a model without conversations."""
        del accumulate
        of_conversations(experiment, path, "next_token")

    def build(self, experiment: AnyExperiment, trained: Collection[str] = ()) -> Loss:
        """See the class."""
        del trained
        return _next_token(experiment.system.model, self.z_loss, self.logits_bytes)

    def element(self, experiment: AnyExperiment, stream: str) -> Callable[[Any], Tree]:
        """A row of one conversation."""
        experiment = of_conversations(experiment, "config.stages", "next_token")
        shape = experiment.text_rows.get(stream, experiment.row)
        return functools.partial(experiment.training_row, shape=shape)

    def example(self, experiment: AnyExperiment, stream: str) -> Tree:
        """A row."""
        experiment = of_conversations(experiment, "config.stages", "next_token")
        return experiment.system.example(experiment.text_rows.get(stream, experiment.row))


@functools.lru_cache(maxsize=64)  # equal objectives are one object, so that equal steps are compiled once
def _next_token(model: nn.Module, z_loss: float, logits_bytes: int | None) -> Loss:
    def loss(
        params: Params,
        batch: Batch,
        key: jax.Array,
        weight: jax.Array | float = 1.0,
        reference: Params | None = None,
    ) -> tuple[jax.Array, Metrics]:
        del reference
        hidden, head, blocks, auxiliary = final_states(model, params, batch, key, logits_bytes)
        found = head_cross_entropy(
            hidden, head.kernel, cast(Any, batch.targets), cast(Any, batch.loss_weights), blocks=blocks, z_loss=z_loss
        )
        padding = jnp.mean(batch.segment_ids == PADDING_SEGMENT, dtype=jnp.float32)
        metrics = {"accuracy": weight * found.accuracy, "padding_share": padding}
        if z_loss:
            metrics["z_loss"] = weight * found.z_loss
        if auxiliary is None:
            return weight * found.value, metrics
        return weight * found.value + auxiliary, {**metrics, "auxiliary_loss": auxiliary}

    return loss


def final_states(
    model: nn.Module, params: Params, batch: Batch, key: jax.Array, logits_bytes: int | None
) -> tuple[jax.Array, HeadKernel, Blocks, jax.Array | None]:
    """What the logits of a batch are made from, one block of the vocabulary at a time.

    Args:
      model: with a decoder.
      params: of all parts.
      batch: of rows.
      key: for reducers and connectors that draw.
      logits_bytes: bound of the float32 logits that a device holds at once; None for `LOGITS_BYTES`.

    Returns:
      The final hidden states, the head, its blocks, and the sum of what modules sow into `losses`; None without any.
    """
    variables = {"params": {part: tree for part, tree in params.items() if part != CELL_HEAD}}
    rngs = {"reduce": key, "connect": key}
    hidden, sown = model.apply(variables, batch, deterministic=False, rngs=rngs, mutable=[LOSSES], method="hidden")
    head = cast(HeadKernel, model.apply(variables, method="head_kernel"))
    shape = (*batch.tokens.shape, head.kernel.shape[head.vocab_axis])
    blocks = Blocks(head.vocab_axis, *block_of_vocabulary(shape, logits_bytes), head.dtype, head.softcap)
    auxiliary = jnp.asarray(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))) if sown else None
    return cast(jax.Array, hidden), head, blocks, auxiliary


def block_of_vocabulary(shape: tuple[int, int, int], logits_bytes: int | None) -> tuple[int, int]:
    """Ids of a block for which a device's float32 logits stay within a bound, and devices that share the vocabulary.

    Blocks are as equal as possible.

    Args:
      shape: B, T and V of all logits; a device's share of each is that of the current mesh.
      logits_bytes: the bound, with at least one id in a block; None for `LOGITS_BYTES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec((axes.BATCH, axes.LENGTH, axes.VOCAB), shape, mesh) if mesh.shape else (None, None, None)
    shards = [math.prod(mesh.shape[axis] for axis in _mesh_axes(entry)) for entry in spec]
    rows, length, ids = (size // count for size, count in zip(shape, shards, strict=True))
    per_id = 4 * rows * length
    most = max(MIN_IDS, LOGITS_BYTES // per_id) if logits_bytes is None else max(1, logits_bytes // per_id)
    num_blocks = -(-ids // most)
    return -(-ids // num_blocks), shards[2]


def _mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
