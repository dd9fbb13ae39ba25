"""The frozen constants against SciPy's fit, and the error of every row that is held out."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from vlm_jax.planner.calibration import ROWS, SCALE, SPREAD, held_out_errors


def test_the_scale_is_the_fit_of_all_rows():
    logs = np.log([row.measured / row.estimated for row in ROWS])
    best = minimize_scalar(lambda scale: ((np.log(scale) - logs) ** 2).sum(), bounds=(0.1, 10), method="bounded")
    assert pytest.approx(best.x, rel=1e-3) == SCALE


def test_every_row_that_is_held_out_is_within_the_range():
    assert len(held_out_errors()) == len(ROWS) and max(map(abs, held_out_errors().values())) < SPREAD
