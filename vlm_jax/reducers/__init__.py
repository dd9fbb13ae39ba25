"""Training-free reducers: they meet the token budget before the connector, in the encoder or in the decoder.

| where | kinds | the budget is |
|---|---|---|
| on the image | downsample_image | features of the encoder |
| in the encoder's blocks | tome | features of the encoder |
| before the connector | random, uniform_stride, visionzip, prumerge, divprune | features that the connector gets |
| before the connector | fastervlm, vispruner, holov | features that the connector gets |
| before the connector, over a video | dycoke, prunevid, fastvid, holitom | features of a frame, in the mean |
| before the connector, by the question | trim | features that the connector gets |
| after the connector, by the question | cdpruner | tokens that the connector gives |
| in the decoder's layers | fastv, pyramid_drop, dart, sparsevlm | visual tokens of an image in the last layers |

A connector after a reducer keeps all features. Kept tokens stay in order; a merged token is at the position of one of
its members. `VLM.reduce` selects whether those before the connector act on its features or on its tokens.

A kind that chooses by the question says in `guided_by` what it needs to know of it. `clip`: `VLM.guide` embeds every
image and its question (`Batch.question`, from the processor) by a CLIP, and passes them on in `features.guidance`; only
a release with a CLIP's tower has one. The kind then has the fields of `reducer.GuidedReducer` too. Reducers in the
decoder find the text in its sequence.

The interface of every entry of `REDUCERS` is the protocol `reducer.Reducer`, tested by
`tests/contracts/test_reducers.py`:

- `for_budget(budget, grid, num_layers) -> dict`, a class method: the fields that leave `budget` of a full-size
  image's `grid`; raises `InfeasibleBudget`; num_layers is that of the part `reduces_in`, 0 where that is None;
- `image_size(height, width, grid) -> (height, width)`: the size to which the processor resizes images;
- `reduced_grid(grid) -> Grid`: the grid of the connector's input, pure Python;
- `connector_budget(grid) -> int`: the number of tokens that the connector must give for `grid`;
- `required_fields() -> {part: {field: value}}`: settings of the encoder and the decoder, which `build` applies;
  it raises for a part without such a field. They neither add nor remove parameters;
- `num_left(count) -> int`, pure Python: the number of tokens in the decoder's row of an image that has `count` before
  the reducer;
- `__call__(features, *, deterministic) -> VisualFeatures` of `num_left` features, with their indices `kept`. Unmasked
  features come first.

All have two fields. `rule` is `exact`, which meets the budget and leaves images within it unchanged,
or `as_released`: the counts, the order and the extra tokens of the released code. `positions` selects whether kept
tokens keep their positions, or positions are renumbered (`consecutive`).

`REDUCERS["none"]` is None: features are unchanged, and the connector meets the budget.

A package outside of vlm_jax adds its kinds by `register_reducer`; see `vlm_jax.plugins`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.plugins import Registry, lacking_of_class
from vlm_jax.reducers.cdpruner import CDPruner
from vlm_jax.reducers.dart import DART
from vlm_jax.reducers.divprune import DivPrune
from vlm_jax.reducers.downsample_image import DownsampleImage
from vlm_jax.reducers.dycoke import DyCoke
from vlm_jax.reducers.fastervlm import FasterVLM
from vlm_jax.reducers.fastv import FastV
from vlm_jax.reducers.fastvid import FastVID
from vlm_jax.reducers.holitom import HoliTom
from vlm_jax.reducers.holov import HoloV
from vlm_jax.reducers.prumerge import PruMerge
from vlm_jax.reducers.prunevid import PruneVid
from vlm_jax.reducers.pyramid_drop import PyramidDrop
from vlm_jax.reducers.random_drop import RandomDrop
from vlm_jax.reducers.reducer import GuidedReducer, Reducer
from vlm_jax.reducers.sparsevlm import SparseVLM
from vlm_jax.reducers.tome import ToMe
from vlm_jax.reducers.trim import TRIM
from vlm_jax.reducers.uniform_stride import UniformStride
from vlm_jax.reducers.visionzip import VisionZip
from vlm_jax.reducers.vispruner import VisPruner

_OWN: Mapping[str, type[Reducer] | None] = {
    "none": None,
    "random": RandomDrop,
    "uniform_stride": UniformStride,
    "downsample_image": DownsampleImage,
    "tome": ToMe,
    "visionzip": VisionZip,
    "prumerge": PruMerge,
    "divprune": DivPrune,
    "fastervlm": FasterVLM,
    "vispruner": VisPruner,
    "holov": HoloV,
    "dycoke": DyCoke,
    "prunevid": PruneVid,
    "fastvid": FastVID,
    "holitom": HoliTom,
    "cdpruner": CDPruner,
    "trim": TRIM,
    "fastv": FastV,
    "pyramid_drop": PyramidDrop,
    "dart": DART,
    "sparsevlm": SparseVLM,
}


def _lacking(kind: str, reducer: Any) -> list[str]:
    guided = getattr(reducer, "guided_by", None) is not None
    return lacking_of_class(GuidedReducer if guided else Reducer)(kind, reducer)


REDUCERS = Registry("register_reducer", _OWN, _lacking)


def register_reducer(kind: str, reducer: type[Any]) -> None:
    """Adds a reducer of another package to `REDUCERS`.

    Args:
      kind: its name, `config.reducer.kind`, and the class attribute `kind`.
      reducer: a Linen module with the interface above; `vlm_jax.testing.reducers` tests it.

    Raises:
      PluginError: the name is taken, or the class lacks a part of the interface.
    """
    REDUCERS.register(kind, reducer)
