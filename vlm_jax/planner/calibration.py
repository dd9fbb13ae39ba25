"""The constants of the predictor, fitted to published steps and frozen.

Each row is a published time, and an estimate for a stand-in: a model of the same sizes, batch and slice. The estimates
are of an earlier compilation, with libtpu 0.0.51 and an earlier predictor: cycles of the compiler, attention kernels at
`KERNEL_SHARE` of the peak for all pairs, and collectives on rings. `predict` has been refined since, and this package
does not remake them. They are lookalikes, not reproductions: the published programs had kernels and flags of their own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A published step.

    Attributes:
      name: what runs on which slice.
      measured: published seconds.
      estimated: seconds of the stand-in before the scale, by the earlier predictor.
    """

    name: str
    measured: float
    estimated: float


# Published training steps of language models on Cloud TPUs, and one product.
ROWS = (
    Row("16B, v5e-256", 10.3, 11.0),
    Row("Llama-3.1-8B, v6e-8", 3.44, 3.44),
    Row("32B, v5p 64 chips", 7.3, 8.8),
    Row("8192 x 8192 x 8192 in bfloat16, v6e", 1.33e-3, 1.47e-3),
)
KERNEL_SHARE = 0.45  # of the peak, in attention kernels; fixed before the rows were estimated
SCALE = 0.915  # `fitted(ROWS)`
SPREAD = 0.25  # of the range; the largest error of a row that is held out is below it


def fitted(rows: Sequence[Row]) -> float:
    """The scale with the least squared error of logarithms."""
    return math.exp(sum(math.log(row.measured / row.estimated) for row in rows) / len(rows))


def held_out_errors(rows: Sequence[Row] = ROWS) -> dict[str, float]:
    """Relative error of each row by the scale that is fitted to the others."""
    return {
        row.name: fitted([other for other in rows if other is not row]) * row.estimated / row.measured - 1
        for row in rows
    }
