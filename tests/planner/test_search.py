"""The order of a search, with plans whose memory and time are given."""

import dataclasses

from vlm_jax.config import ConfigError
from vlm_jax.planner.memory import Memory
from vlm_jax.planner.request import Request
from vlm_jax.planner.search import TIMED, search

GIB = 2**30
PEAKS = {"none": 20, "dots": 12, "full": 8}
SECONDS = {("dots", 1): 0.5, ("full", 1): 0.6, ("dots", 2): 0.4}


def test_candidates_that_fit_are_timed_and_ranked(config, trained):
    """Four chips of 16 GiB: without rematerialisation nothing fits; three that fit are compiled for their time."""
    asked = []

    def make(request, folder, working):
        del folder, working
        remat, tensor = request.config.decoder.remat, request.config.mesh.tensor
        if tensor == 4:
            raise ConfigError("config.mesh: heads cannot be divided")
        asked.append((remat, tensor, request.quick))
        peak = PEAKS[remat] * GIB // tensor
        used = Memory(0, 0, peak, 0, peak, (16 if tensor == 1 else 9) * GIB, peak <= (16 if tensor == 1 else 9) * GIB)
        full = trained["v5e:2x2"]
        time = None if request.quick else dataclasses.replace(full.step_time, seconds=SECONDS[remat, tensor])
        return dataclasses.replace(full, memory=used, step_time=time), False

    found = search(Request(config, "v5e:2x2"), None, make=make)
    timed = [one for one in found if one.plan is not None and one.plan.step_time is not None]
    assert [(one.remat, one.mesh["tensor"]) for one in timed] == [("dots", 2), ("dots", 1), ("full", 1)]
    assert len(timed) == TIMED and found[: len(timed)] == timed
    assert [(one.remat, one.mesh["tensor"]) for one in found[3:6]] == [("full", 2), ("none", 2), ("none", 1)]
    assert all("heads cannot be divided" in one.refused for one in found[6:]) and len(found) == 9
    assert [quick for _, _, quick in asked] == [True] * 6 + [False] * TIMED
