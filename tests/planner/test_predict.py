"""The terms of a predicted time, of programs whose cycles are given."""

import pytest

from vlm_jax.costs.chips import chip_of
from vlm_jax.planner.calibration import KERNEL_SHARE, SCALE
from vlm_jax.planner.collectives import collectives
from vlm_jax.planner.predict import estimate
from vlm_jax.planner.program_text import UNKNOWN_CYCLES, parse_program

CHIP = chip_of("TPU v5 lite")
TEXT = """ENTRY %main (a: f32[1000000]) -> f32[1000000] {
  %a = f32[1000000]{0} parameter(0)
  %sum = f32[1000000]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, backend_config={"estimated_cycles":"7000"}
  %work = f32[1000000]{0} add(%sum, %a), backend_config={"estimated_cycles":"3000"}
  ROOT %copied = f32[1000000]{0} copy(%work), backend_config={"estimated_cycles":"UNKNOWN"}
}
"""


def test_cycles_of_a_collective_do_not_count_beside_its_time_on_the_links():
    program = parse_program(TEXT.replace("UNKNOWN", str(UNKNOWN_CYCLES)))
    found = collectives(program, {"data": 4})
    given = {"flops": 3e6, "kernel_flops": 1e6, "model_flops": 2e6, "traffic": 4e6}
    own = estimate(program, found, CHIP, **given)
    copied = 2 * 4e6 / CHIP.hbm_bandwidth  # without cycles it takes as long as its bytes
    assert own.instructions == pytest.approx(3000 / CHIP.clock + copied)
    assert own.without_cycles == pytest.approx(copied / own.instructions)
    assert own.exposed == pytest.approx(2 * 4e6 * 3 / 4 / (2 * CHIP.link_bandwidth))
    assert own.kernels == pytest.approx(1e6 / CHIP.flops / KERNEL_SHARE) and own.compute == pytest.approx(
        3e6 / CHIP.flops
    )
    assert own.seconds == pytest.approx(SCALE * (own.instructions + own.exposed + own.kernels))
    assert own.mfu == pytest.approx(2e6 / own.seconds / CHIP.flops)
