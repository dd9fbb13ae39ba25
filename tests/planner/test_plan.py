"""Plans of a small model for real slices, against closed forms."""

from collections import Counter

import pytest

from .conftest import WIDTH

MIB = 2**20


@pytest.mark.parametrize(("name", "most"), [("v5e:2x2", 24), ("v5p:2x2x1", 48)])
def test_memory_of_a_small_plan_is_within_bounds(trained, name, most):
    """So that a change that breaks a TPU, or doubles what a step holds there, fails here."""
    plan = trained[name]
    assert plan.memory.fits and plan.num_devices == 4 and plan.mesh == {"fsdp": 4}
    assert plan.memory.arguments == pytest.approx(sum(one.bytes for one in plan.parameters), rel=0.1)
    assert plan.memory.outputs < MIB  # the state is donated
    assert 4 * MIB < plan.memory.temporaries < most * MIB


def test_parameters_and_optimizer_have_their_closed_forms(trained):
    """Float32 masters and two moments, each divided by the devices; of a decoder of two gated blocks."""
    plan = trained["v5e:2x2"]
    sizes = {one.name: one for one in plan.parameters}
    block = 4 * WIDTH * WIDTH + 3 * WIDTH * 2 * WIDTH + 2 * WIDTH
    decoder = 2 * block + 2 * 26 * WIDTH + WIDTH
    assert sizes["parameters of decoder"].count == decoder
    assert sizes["parameters of decoder"].bytes == pytest.approx(4 * decoder / 4, rel=0.01)
    learned = decoder + sizes["parameters of connector"].count
    assert sizes["optimizer"].bytes == pytest.approx(2 * 4 * learned / 4, rel=0.01)


def test_collectives_of_fsdp_are_those_of_its_closed_form(trained):
    """In bfloat16, a kernel of a block is gathered forward and backward; those of attention also to recompute.

    To recompute, the compiler gathers the latter in the shape of their heads. Connector and frozen encoder are gathered
    once, and a gradient is scattered once, but for a last dimension: gradients of kernels whose outputs are divided are
    all-reduced.
    """
    plan = trained["v5e:2x2"]
    kernels = {one.name: one.count for one in plan.parameters}
    decoder, rest = kernels["parameters of decoder"], kernels["parameters of connector"]
    attention, mlp, blocks = 4 * WIDTH * WIDTH, 3 * WIDTH * 2 * WIDTH, 2
    sent = Counter[str]()
    for one in plan.moved:
        sent[one.kind] += one.sent
    assert {one.axes for one in plan.moved} == {("fsdp",)}
    kept = 2 * 3 / 4  # bytes of an element that a ring of four sends for each of its elements
    gathered = blocks * (3 * attention + 2 * mlp) + rest + kernels["parameters of encoder"]
    assert sent["all-gather"] == pytest.approx(kept * gathered, rel=0.1)
    by_output = 2 * (WIDTH * WIDTH + 2 * WIDTH * WIDTH) + WIDTH * WIDTH  # of attention and MLP, and of the connector
    assert sent["reduce-scatter"] == pytest.approx(kept * (decoder + rest - by_output), rel=0.1)
    assert sent["all-reduce"] == pytest.approx(2 * kept * by_output, rel=0.1)
    assert set(sent) == {"all-gather", "reduce-scatter", "all-reduce"}  # no activation changes its device


def test_a_time_is_an_estimate_with_its_terms(trained):
    full, quick = trained["v5e:2x2"], trained["v5p:2x2x1"]
    assert quick.step_time is None and "memory alone" in quick.refused
    assert full.step_time is not None and full.step_time.low < full.step_time.seconds < full.step_time.high
    assert full.step_time.seconds >= full.flops / 197e12 and full.flops > full.model_flops > 0
    assert any("not a measurement" in line for line in full.assumptions)
    assert set(full.versions) == {"jax", "libtpu"}
