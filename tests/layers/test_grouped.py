"""Grouped products against a loop over rows, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers import grouped
from vlm_jax.layers.attention import written_out
from vlm_jax.layers.grouped import by_group, choose_implementation

WIDTH, OUT = 6, 5
CASES = {  # rows of each group, and rows that belong to none
    "uneven": ([3, 0, 5, 1], 0),
    "few rows": ([0, 1, 0, 1], 0),
    "blocks": ([17, 40, 0, 9], 0),
    "left over": ([3, 0, 2, 0], 7),
    "none": ([0, 0, 0, 0], 4),
}
both = pytest.mark.parametrize("implementation", ["ragged", "blocks"])


def made(case):
    sizes, rest = CASES[case]
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(sum(sizes) + rest, WIDTH)).astype(np.float32)
    kernels = [rng.normal(size=(len(sizes), *shape)).astype(np.float32) for shape in ((WIDTH, OUT), (OUT, OUT))]
    return rows, np.array(sizes, np.int32), kernels


def run(rows, sizes, kernels, implementation):
    def function(x, dot):
        return dot(jnp.tanh(dot(x, kernels[0])), kernels[1])

    return by_group(function, jnp.asarray(rows), jnp.asarray(sizes), implementation=implementation)


@both
@pytest.mark.parametrize("case", CASES)
def test_each_row_meets_the_kernel_of_its_group(case, implementation):
    rows, sizes, kernels = made(case)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.zeros((len(rows), OUT))
    for i, group in enumerate(groups):
        expected[i] = np.tanh(rows[i] @ kernels[0][group]) @ kernels[1][group]
    got = jax.jit(run, static_argnums=3)(rows, sizes, kernels, implementation)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@both
@pytest.mark.parametrize("case", ["uneven", "blocks", "left over"])
def test_gradients(case, implementation, monkeypatch):
    monkeypatch.setattr(grouped, "_BLOCK", 8)  # groups that share a block, and such as fill several
    rows, sizes, kernels = made(case)
    groups = np.repeat(np.arange(len(sizes)), sizes)

    def loop(rows, kernels):
        first, second = (kernel[groups] for kernel in kernels)
        hidden = jnp.tanh(jnp.einsum("md,mde->me", rows[: len(groups)], first))
        return jnp.sin(jnp.einsum("md,mde->me", hidden, second)).sum()

    def ours(rows, kernels):
        return jnp.sin(run(rows, sizes, kernels, implementation)).sum()

    got, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(jnp.asarray(rows), kernels) for f in (ours, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_rows_of_other_groups_are_no_part_of_a_gradient(monkeypatch):
    """They share a block of rows; one group overflows, and rows without a group hold anything."""
    monkeypatch.setattr(grouped, "_BLOCK", 8)
    rows, sizes, kernels = made("left over")
    rows[0], rows[sizes.sum() :] = np.inf, np.nan

    def loss(kernel):
        return by_group(
            lambda x, dot: dot(x, kernel), jnp.asarray(rows), jnp.asarray(sizes), implementation="ragged"
        ).sum()

    got = jax.jit(jax.grad(loss))(kernels[0])
    np.testing.assert_allclose(got[2], np.repeat(rows[3:5].sum(axis=0)[:, None], OUT, axis=1), rtol=1e-6)
    assert not np.isfinite(got[0]).any() and not got[1].any() and not got[3].any()


@pytest.mark.parametrize(("platform", "chosen"), [("cpu", "blocks"), ("gpu", "blocks"), ("tpu", "ragged")])
def test_the_platform_chooses(platform, chosen, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert choose_implementation() == chosen
    with written_out():
        assert choose_implementation() == "ragged"


def test_rows_are_filled_up_for_the_kernel_of_a_tpu(monkeypatch):
    rows, sizes, kernels = made("uneven")
    kernels = [jnp.asarray(kernel) for kernel in kernels]
    expected = run(rows, sizes, kernels, "blocks")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jaxpr = jax.make_jaxpr(lambda rows: run(rows, sizes, kernels, None))(rows)
    calls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "custom_vjp_call"]
    products = [eqn.params["call_jaxpr"].eqns[0] for eqn in calls]
    assert {eqn.primitive.name for eqn in products} == {"ragged_dot_general"}
    assert [eqn.invars[0].aval.shape[0] for eqn in products] == [16, 16]  # of 9
    np.testing.assert_allclose(run(rows, sizes, kernels, None), expected, atol=1e-5)


def test_blocks_take_no_product_with_kernels_of_other_groups():
    """What XLA counts: the ragged product takes that of all rows with all kernels on the CPU, a block its own."""
    rows, kernel = jnp.zeros((64, WIDTH)), jnp.zeros((16, WIDTH, OUT))
    sizes = jnp.full(16, 4)
    needed = 2 * 64 * WIDTH * OUT

    def flops(implementation):
        # Sums of the loop's body are counted once: here a body is two rows of one group, of 64 + 16 rows.
        run = jax.jit(lambda: by_group(lambda x, dot: dot(x, kernel), rows, sizes, implementation=implementation))
        return run.lower().compile().cost_analysis()["flops"]

    assert flops("ragged") >= 16 * needed
    assert flops("blocks") < needed
