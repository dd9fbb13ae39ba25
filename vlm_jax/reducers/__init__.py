"""Training-free reducers: they meet the token budget before the connector, in the encoder or in the decoder.

| where | kinds | the budget is |
|---|---|---|
| on the image | downsample_image | features of the encoder |
| in the encoder's blocks | tome | features of the encoder |
| before the connector | random, uniform_stride, visionzip, prumerge, divprune | features that the connector gets |
| in the decoder's layers | fastv, pyramid_drop | visual tokens of an image in the last layers |

A connector behind a reducer keeps what it gets. Kept tokens stay in their order; a merged token stands where one of
its members stood. `VLM.reduce` says whether those before the connector act on its features or on its tokens.

The contract is the protocol `reducer.Reducer`, and `tests/contracts/test_reducers.py` holds every entry of `REDUCERS`
to it:

- `for_budget(budget, grid, num_layers) -> dict`, a class method: the fields that leave `budget` of a full-size
  image's `grid`, or `InfeasibleBudget`; num_layers is that of the part `reduces_in`, 0 where that is None;
- `image_size(height, width, grid) -> (height, width)`: what the processor resizes images to;
- `reduced_grid(grid) -> Grid`: the grid that the connector meets, pure Python;
- `connector_budget(grid) -> int`: how many tokens the connector is to give of it;
- `required_fields() -> {part: {field: value}}`: what the encoder and the decoder must be set to; `build` does so,
  and refuses a part without such a field. No parameter comes or goes with them;
- `num_left(count) -> int`, pure Python: how many tokens an image takes in the decoder's row that has `count` before
  the reducer;
- `__call__(features, *, deterministic) -> VisualFeatures` of `num_left` features, with `kept`: which those are. What is
  real stands in front.

Two fields are common to all. `rule` is `exact`, by which the budget is met and an image that has no more passes as it
is, or `as_released`: the counts, the order and the extra tokens of the released code. `positions` says whether a token
that is left keeps its position, or positions are numbered anew (`consecutive`).

`REDUCERS["none"]` is None: features pass as they are, and the connector meets the budget.
"""

from collections.abc import Mapping

from vlm_jax.reducers.divprune import DivPrune
from vlm_jax.reducers.downsample_image import DownsampleImage
from vlm_jax.reducers.fastv import FastV
from vlm_jax.reducers.prumerge import PruMerge
from vlm_jax.reducers.pyramid_drop import PyramidDrop
from vlm_jax.reducers.random_drop import RandomDrop
from vlm_jax.reducers.reducer import Reducer
from vlm_jax.reducers.tome import ToMe
from vlm_jax.reducers.uniform_stride import UniformStride
from vlm_jax.reducers.visionzip import VisionZip

REDUCERS: Mapping[str, type[Reducer] | None] = {
    "none": None,
    "random": RandomDrop,
    "uniform_stride": UniformStride,
    "downsample_image": DownsampleImage,
    "tome": ToMe,
    "visionzip": VisionZip,
    "prumerge": PruMerge,
    "divprune": DivPrune,
    "fastv": FastV,
    "pyramid_drop": PyramidDrop,
}
