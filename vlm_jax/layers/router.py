"""Routing of tokens to experts, with weights."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.layers.dense import KERNEL_INIT, with_axes
from vlm_jax.layers.scan import LOSSES
from vlm_jax.types import Dtype, Fields

Selection = Literal["greedy", "group_limited_greedy", "noaux_tc"]
Scoring = Literal["softmax", "sigmoid"]


class Routing(NamedTuple):
    """The K experts of every token."""

    expert: Int[Array, "B T K"]
    weight: Float[Array, "B T K"]


def unbalanced(num_experts: int, num_selected: int, *, normalize: bool = True) -> Fields:
    """Arguments of a `Router` without a balance loss, as released models are trained further."""
    return {"num_experts": num_experts, "num_selected": num_selected, "normalize": normalize, "balance_weight": 0.0}


class Router(nn.Module):
    """Scores every expert for every token in float32, and selects `num_selected`.

    Where the collection `losses` is mutable, the balance loss is sown into it: `balance_weight` times the sum
    over experts of (share of the selections, 1 when even) * (mean score). The shares have no gradient.
    Padding is counted like other tokens, as in the reference.

    Attributes:
      num_experts: experts to choose from.
      num_selected: K, experts of a token.
      scoring: scores are the softmax or the sigmoid of the logits.
      selection: `greedy`, the highest scores; `group_limited_greedy`, the highest scores in the groups with the
        highest maximum; `noaux_tc`, the highest score plus learned bias, in the groups with the highest sum
        of their top two. The bias is used for selection only; it has no gradient.
      num_groups, num_selected_groups: groups of experts and how many of them are available to a token; 1 and
        1 mean no groups.
      normalize: divides the selected scores by their sum.
      scale: factor of the weights.
      balance_weight: factor of the balance loss; 0 for none.
      balance_over: shares and means are over a row (`sequence`), averaged over rows, or over the `batch`.
      param_dtype: dtype of the stored parameters.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), sections 2.2.1 to 2.2.3; 2024 (DeepSeek-V3), section 2.1.2;
    deepseek-ai/DeepSeek-VL2, modeling_deepseek.py, MoEGate.
    """

    num_experts: int
    num_selected: int
    scoring: Scoring = "softmax"
    selection: Selection = "greedy"
    num_groups: int = 1
    num_selected_groups: int = 1
    normalize: bool = False
    scale: float = 1.0
    balance_weight: float = 0.001
    balance_over: Literal["sequence", "batch"] = "sequence"
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Routing:
        """Routes the tokens.

        Raises:
          ValueError: groups that do not divide the experts, or fewer experts available to a token than num_selected.
        """
        self._check()
        names, shape = (axes.EMBED, axes.CLASSES), (x.shape[-1], self.num_experts)
        # In full precision on every platform: a rounded logit can select another expert.
        x, precision = x.astype(jnp.float32), jax.lax.Precision.HIGHEST
        kernel = self.param("kernel", with_axes(KERNEL_INIT, *names), shape, self.param_dtype)
        logits = jnp.dot(x, kernel.astype(jnp.float32), precision=precision)
        scores = jax.nn.softmax(logits) if self.scoring == "softmax" else jax.nn.sigmoid(logits)
        expert = jax.lax.top_k(self._ranking(scores), self.num_selected)[1]
        weight = jnp.take_along_axis(scores, expert, axis=-1)
        if self.normalize:
            weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
        if self.balance_weight and not self.is_initializing():
            self.sow(LOSSES, "balance", self.balance_weight * self._imbalance(scores, expert))
        return Routing(expert, weight * self.scale)

    def _ranking(self, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The scores used for selection; experts of unselected groups have 0."""
        scores = jax.lax.stop_gradient(scores)
        if self.selection == "greedy":
            return scores
        if self.selection == "noaux_tc":
            init = with_axes(nn.initializers.zeros, axes.CLASSES)
            bias = self.param("bias", init, (self.num_experts,), self.param_dtype)
            scores = scores + jax.lax.stop_gradient(bias).astype(jnp.float32)[None, None]
        grouped = scores.reshape(*scores.shape[:-1], self.num_groups, -1)
        best = jax.lax.top_k(grouped, 2 if self.selection == "noaux_tc" else 1)[0].sum(-1)
        chosen = jax.lax.top_k(best, self.num_selected_groups)[1]
        is_open = jax.nn.one_hot(chosen, self.num_groups, dtype=bool).any(-2)
        return jnp.where(is_open[..., None], grouped, 0).reshape(scores.shape)

    def _imbalance(self, scores: Float[Array, "B T E"], expert: Int[Array, "B T K"]) -> Float[Array, ""]:
        if self.balance_over == "batch":
            scores, expert = (leaf.reshape(1, -1, leaf.shape[-1]) for leaf in (scores, expert))
        rows = jnp.arange(len(expert))[:, None, None]
        counts = jnp.zeros((len(expert), self.num_experts)).at[rows, expert].add(1)
        shares = counts * (self.num_experts / (expert.shape[1] * expert.shape[2]))
        return (shares * scores.mean(axis=1)).sum(-1).mean()

    def _check(self) -> None:
        groups, size = self.num_groups, self.num_experts // max(self.num_groups, 1)
        if groups < 1 or self.num_experts % groups or not 1 <= self.num_selected_groups <= groups:
            raise ValueError(
                f"num_groups and num_selected_groups: expected groups of equal size and at most as many selected, "
                f"got {self.num_experts} experts in {groups} groups, {self.num_selected_groups} selected"
            )
        available = self.num_experts if self.selection == "greedy" else size * self.num_selected_groups
        if not 1 <= self.num_selected <= available:
            raise ValueError(
                f"num_selected: expected 1 to {available} (experts available to a token), got {self.num_selected}"
            )
        if self.selection == "noaux_tc" and size < 2:
            raise ValueError(f"num_groups: noaux_tc needs groups of at least 2 experts, got {groups} of {size}")
