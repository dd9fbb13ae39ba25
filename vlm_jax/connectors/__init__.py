"""Connectors: visual features of the encoder in, visual tokens of the decoder's width out.

The contract, which `tests/contracts/test_connectors.py` holds every entry of `CONNECTORS` to:

- a Linen module with the fields `features` (the decoder's width), `dtype` and `param_dtype`;
- `num_tokens(grid) -> int`, pure Python, callable before `init`; raises `InfeasibleGrid` for a
  grid that the kind cannot take;
- `token_grid(grid) -> Grid | None`, likewise: rows and columns of the tokens, each of which stands for its block of
  features; None where a token has no place, as a learned query. Of packed features, whose grid is
  (block, N // block), the grid has as many tokens and says how large a block each stands for;
- `for_budget(budget, grid) -> dict`, a class method that solves the kind's own fields so that
  `num_tokens(grid) == budget`, or raises `InfeasibleBudget` naming the nearest feasible budgets; settings
  that the solution depends on are keyword arguments with a default, and come back among the fields;
- `__call__(features: VisualFeatures, *, deterministic: bool) -> VisualTokens`; what a masked
  feature holds changes nothing, and features in blocks (`VisualFeatures.block`) give the tokens that
  those in rows give, in any order, or raise `InfeasibleGrid`. Without `deterministic` a kind may draw
  from the rng stream `connect`. A kind that reads more than features takes it as a further argument whose
  default is None, as `qformer` takes an `instruction`.

Those of `PACKED_CONNECTORS` also take packed images, several in a sequence: a token is made of one block of
neighbours, so that the tokens of one image follow those of the image before.
"""

from collections.abc import Mapping

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

CONNECTORS: Mapping[str, type[Connector]] = {
    "mlp": MlpConnector,
    "hybrid_mlp": HybridMlp,
    "pool": Pool,
    "concat": Concat,
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
PACKED_CONNECTORS = ("mlp", "concat", "pixel_shuffle", "visual_vocabulary")
