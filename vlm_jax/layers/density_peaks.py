"""Density-peak clustering with nearest neighbours (DPC-KNN): centres are dense, and far from all that are denser.

The functions are of one set of vectors, and take the groups that are clustered apart as a mask of pairs, which padding
is in no group of.

Source: Rodriguez and Laio 2014; Du et al. 2016; cluster_dpc_knn, as it is in the released code of PruneVid, FastVID,
HoliTom and SparseVLM. Deviations: no noise is added to densities unless given, so that among equally dense vectors none
is denser; a group with fewer vectors than neighbours has as many neighbours as vectors.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def distances(x: Float[Array, "N D"]) -> Float[Array, "N N"]:
    """Euclidean distances divided by the root of the width, float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=0, keepdims=True)  # less is lost where vectors are alike
    squares = (x**2).sum(axis=1)
    products = jnp.einsum("nd,md->nm", x, x, precision="highest")
    found = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None] - 2 * products, 0)) / x.shape[1] ** 0.5
    return jnp.where(jnp.eye(len(x), dtype=bool), 0, found)


def together(group: Int[Array, "N"], member: Bool[Array, "N"]) -> Bool[Array, "N N"]:
    """True where both are members of the same group; a member is with itself."""
    return (group[:, None] == group[None]) & member[:, None] & member[None]


def peak_scores(
    distance: Float[Array, "N N"],
    pairs: Bool[Array, "N N"],
    most: int,
    neighbors: Int[Array, "N"] | Int[Array, ""] | int | None = None,
    noise: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """Density times the distance to the nearest denser vector of the group; -inf for vectors in no group.

    Args:
      distance: between all vectors.
      pairs: which are of the same group.
      most: nearest neighbours whose distances give the density, the vector itself included.
      neighbors: fewer neighbours, for the group of each vector or for all; None for `most`.
      noise: added to the densities, so that none are equal.
    """
    size = pairs.sum(axis=1)
    count = jnp.clip(most if neighbors is None else neighbors, 1, jnp.maximum(jnp.minimum(size, most), 1))
    near = -jax.lax.top_k(jnp.where(pairs, -distance, -jnp.inf), min(most, len(distance)))[0]
    squares = jnp.where(jnp.arange(near.shape[1])[None] < count[:, None], near**2, 0)
    density = jnp.exp(-squares.sum(axis=1) / count)
    density = density if noise is None else density + noise
    widest = jnp.where(pairs, distance, 0).max(axis=1)
    widest = jnp.where(pairs, widest[None], 0).max(axis=1)  # of the whole group
    denser = pairs & (density[None] > density[:, None])
    parent = jnp.where(denser, distance, widest[:, None]).min(axis=1)
    return jnp.where(jnp.diagonal(pairs), parent * density, -jnp.inf)


def ranks(scores: Float[Array, "N"], pairs: Bool[Array, "N N"]) -> Int[Array, "N"]:
    """How many of a vector's group have a higher score, or the same and come first; N for vectors in no group."""
    place = jnp.arange(len(scores))
    higher = (scores[None] > scores[:, None]) | ((scores[None] == scores[:, None]) & (place[None] < place[:, None]))
    return jnp.where(jnp.diagonal(pairs), (higher & pairs).sum(axis=1), len(scores))


def nearest_centers(
    distance: Float[Array, "N N"], pairs: Bool[Array, "N N"], center: Bool[Array, "N"], rank: Int[Array, "N"]
) -> Int[Array, "N"]:
    """The index of the nearest centre of each vector's group, of a centre its own; N where the group has none.

    Of equally near centres it is the one of the lowest rank.
    """
    size = len(rank)
    usable = pairs & center[None]
    far = jnp.where(usable, distance, jnp.inf)
    tied = usable & (far == far.min(axis=1, keepdims=True))
    found = jnp.argmin(jnp.where(tied, rank[None], size), axis=1)
    found = jnp.where(center, jnp.arange(size), found)
    return jnp.where(usable.any(axis=1), found, size)
