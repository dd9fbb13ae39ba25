"""SigLIP's sigmoid loss: every pair of an image and a text is a separate binary classification."""

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.losses.pairwise import Axis, Offset, Scalars, Tile, Towers, make_tile
from vlm_jax.types import Array, Tree


def _pair_losses(tile: Tile) -> jax.Array:
    # -log sigmoid(logit) for matching pairs, -log sigmoid(-logit) for others.
    return jax.nn.softplus(jnp.where(tile.positive, -tile.student, tile.student))


class Sigmoid:
    """The objective `mean_i sum_j -log sigmoid(±logit_ij)`, plus for matching pairs, minus for others.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", eq. 1 and algorithm 1.
    """

    one_pass = True
    has_teacher = False

    def full(self, own: Towers, every: Towers, scalars: Scalars, first: Offset) -> tuple[jax.Array]:
        tile = make_tile(Towers(own.image, every.text), scalars, first)
        return (jnp.sum(_pair_losses(tile)) / own.image.shape[0],)

    def empty(self, rows: int, columns: int) -> tuple[jax.Array, None]:
        return jnp.zeros(rows, jnp.float32), None

    def statistics(self, tile: Tile) -> tuple[jax.Array, None]:
        return jnp.sum(_pair_losses(tile), axis=1), None

    def merge(self, left: Tree, right: Tree) -> Tree:
        return jax.tree.map(jnp.add, left, right)

    def combine(self, statistics: Tree, axis: Axis | None) -> Tree:
        return lax.psum(statistics, axis)

    def totals(self, rows: jax.Array, columns: None) -> tuple[jax.Array]:
        return (jnp.sum(rows),)

    def gradient(self, tile: Tile, rows: Tree, columns: Tree, weights: tuple[Array | float, ...]) -> jax.Array:
        sign = jnp.where(tile.positive, -1.0, 1.0)
        return weights[0] * sign * jax.nn.sigmoid(sign * tile.student)
