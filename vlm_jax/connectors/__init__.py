"""Connectors: visual features of the encoder in, visual tokens of the decoder's width out.

The interface of every entry of `CONNECTORS`, tested by `tests/contracts/test_connectors.py`:

- a Linen module with the fields `features` (the decoder's width), `dtype` and `param_dtype`;
- `num_tokens(grid) -> int`, pure Python, callable before `init`; raises `InfeasibleGrid` for a
  grid that the kind does not support;
- `token_grid(grid) -> Grid | None`, likewise: rows and columns of the tokens, each of which represents a block of
  features; None where tokens have no position, as with learned queries. For packed features, whose grid is
  (block, N // block), the token grid determines the block size of a token;
- `for_budget(budget, grid) -> dict`, a class method that solves the kind's own fields so that
  `num_tokens(grid) == budget`, or raises `InfeasibleBudget` with the nearest feasible budgets; settings
  that the solution depends on are keyword arguments with a default, and are included in the result;
- `__call__(features: VisualFeatures, *, deterministic: bool) -> VisualTokens`; masked
  features are ignored, and features in blocks (`VisualFeatures.block`) give the same tokens as
  those in rows, in any order, or raise `InfeasibleGrid`. Without `deterministic` a kind may sample
  from the rng stream `connect`. Further inputs are optional arguments with default None, such as the
  `instruction` of `qformer`.

Those of `PACKED_CONNECTORS` also take packed images, several in a sequence: each token is computed from one block of
neighbours, so that tokens keep the order of the images.

A package outside of vlm_jax adds its kinds by `register_connector`; see `vlm_jax.plugins`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.connectors.block_mean import BlockMean
from vlm_jax.connectors.c_abstractor import CAbstractor
from vlm_jax.connectors.concat import Concat
from vlm_jax.connectors.connector import Connector
from vlm_jax.connectors.hybrid_mlp import HybridMlp
from vlm_jax.connectors.ldp import LDP
from vlm_jax.connectors.ldp_v2 import LDPv2
from vlm_jax.connectors.matryoshka import Matryoshka
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.connectors.perceiver import Perceiver
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.connectors.pool import Pool
from vlm_jax.connectors.qformer import QFormer
from vlm_jax.connectors.resampler import Resampler
from vlm_jax.connectors.token_packer import TokenPacker
from vlm_jax.connectors.visual_vocabulary import VisualVocabulary
from vlm_jax.plugins import Registry, lacking_of_class

_OWN: Mapping[str, type[Connector]] = {
    "mlp": MlpConnector,
    "hybrid_mlp": HybridMlp,
    "pool": Pool,
    "concat": Concat,
    "block_mean": BlockMean,
    "pixel_shuffle": PixelShuffle,
    "visual_vocabulary": VisualVocabulary,
    "ldp": LDP,
    "ldp_v2": LDPv2,
    "resampler": Resampler,
    "perceiver": Perceiver,
    "qformer": QFormer,
    "c_abstractor": CAbstractor,
    "token_packer": TokenPacker,
    "matryoshka": Matryoshka,
}
_PACKED = ("mlp", "concat", "block_mean", "pixel_shuffle", "visual_vocabulary")

CONNECTORS = Registry("register_connector", _OWN, lacking_of_class(Connector))
PACKED_CONNECTORS = Registry("register_connector", {kind: _OWN[kind] for kind in _PACKED}, lacking_of_class(Connector))


def register_connector(kind: str, connector: type[Any], *, packed: bool = False) -> None:
    """Adds a connector of another package to `CONNECTORS`.

    Args:
      kind: its name, `config.connector.kind`; the class attribute `kind`, if it has one, must equal it.
      connector: a Linen module with the interface above; `vlm_jax.testing.connectors` tests it.
      packed: whether it belongs to `PACKED_CONNECTORS` too.

    Raises:
      PluginError: the name is taken, or the class lacks a part of the interface.
    """
    CONNECTORS.register(kind, connector)
    if packed:
        PACKED_CONNECTORS.register(kind, connector)
