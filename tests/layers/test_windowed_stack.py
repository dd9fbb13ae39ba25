import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import TransformerBlock
from vlm_jax.layers.rope_2d import rope_2d_angles
from vlm_jax.layers.windowed_stack import Schedule, WindowedStack, restore_order, runs, schedule
from vlm_jax.processors.patches import pack_patches

WIDTH, HEADS = 8, 2
BLOCK = {
    "num_heads": HEADS,
    "mlp_dim": 12,
    "activation": "silu",
    "gated": True,
    "norm": "rms",
    "norm_epsilon": 1e-6,
}
GRIDS = [(1, 6, 10), (2, 4, 6)]  # windows that edges cut off share rows, of one image as well


def packed_patches(grids=GRIDS, **more):
    count = int(np.prod(grids, axis=1).sum())
    patches = np.random.default_rng(0).normal(size=(count, WIDTH)).astype(np.float32)
    return jax.tree.map(jnp.asarray, pack_patches(patches, grids, merge_size=2, window=2, **more))


def angles_of(packed):
    return rope_2d_angles(packed.positions, WIDTH // HEADS, 10_000.0)


def initialised(stack, packed):
    variables = nn.meta.unbox(jax.eval_shape(stack.init, jax.random.key(0), packed.patches, packed))
    leaves, structure = jax.tree.flatten(variables)
    random = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [random.normal(size=x.shape).astype(np.float32) * 0.3 for x in leaves])


def unrolled(params, packed, depth, full):
    """Every state of the stack, one layer after the other, with masks over all pairs of patches."""
    states = [packed.patches]
    for i in range(depth):
        ids = packed.segment_ids if i in full else packed.window_ids
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]["layers"])
        context = Context("full", ids, ids, angles=angles_of(packed))
        states.append(TransformerBlock(**BLOCK).apply({"params": layer}, states[-1], None, context)[0])
    return jnp.stack(states)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("f" * 4, ("f", 4, "")),
        ("wwwf" * 3, ("wwwf", 3, "")),
        ("wf" * 2 + "w", ("wf", 2, "w")),
        ("wwf", ("w", 2, "f")),
        ("fww", ("f", 1, "ww")),
        ("", ("", 1, "")),
    ],
)
def test_schedule_finds_the_pattern(kinds, expected):
    names = {"f": "full", "w": "window"}
    period, repeats, rest = expected
    spelled = [tuple(names[kind] for kind in part) for part in (kinds, period, rest)]
    assert schedule(spelled[0]) == Schedule(spelled[1], repeats, spelled[2])


def test_runs_joins_neighbours():
    assert runs(("window", "window", "full", "window")) == [("window", 2), ("full", 1), ("window", 1)]


@pytest.mark.parametrize(
    ("depth", "full"),
    [(4, (1, 3)), (4, (0,)), (6, (2, 5)), (2, ()), (2, None)],
)
def test_equals_layers_with_masks(depth, full):
    packed = packed_patches()
    stack = WindowedStack(depth, BLOCK, full_layers=full)
    params = initialised(stack, packed)
    out, hidden, _ = jax.jit(lambda p, x: stack.apply(p, x.patches, x, angles_of(x), collect=True))(params, packed)
    every = tuple(range(depth)) if full is None else full
    expected = jax.jit(lambda p, x: unrolled(p, x, depth, every))(params, packed)
    real = np.asarray(packed.segment_ids[0] > 0)
    np.testing.assert_allclose(hidden[:, :, real], expected[:, :, real], atol=1e-5)
    np.testing.assert_array_equal(out, hidden[-1])


def test_remat_changes_no_gradient():
    packed = packed_patches()
    real = (packed.segment_ids > 0)[..., None]
    stacks = [WindowedStack(4, BLOCK, full_layers=(1, 3), remat=remat) for remat in ("none", "full")]
    params = initialised(stacks[0], packed)

    def loss(stack):
        return lambda p: jnp.sum(jnp.where(real, stack.apply(p, packed.patches, packed)[0], 0) ** 2)

    plain, saved = (jax.jit(jax.grad(loss(stack)))(params) for stack in stacks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, saved)
    assert "remat" in str(jax.make_jaxpr(jax.grad(loss(stacks[1])))(params))


def test_programs_do_not_grow_with_layers():
    packed = packed_patches()

    def products(depth):
        stack = WindowedStack(depth, BLOCK, full_layers=tuple(range(3, depth, 4)))
        shapes = jax.eval_shape(stack.init, jax.random.key(0), packed.patches, packed)
        return str(jax.make_jaxpr(stack.apply)(shapes, packed.patches, packed)).count("dot_general[")

    assert products(8) == products(16) == products(32)


def flops(full, rows):
    packed = packed_patches([(1, rows, 8)])
    assert packed.segment_ids.shape == (1, rows * 8)
    stack = WindowedStack(4, BLOCK, full_layers=full)
    shapes = jax.eval_shape(stack.init, jax.random.key(0), packed.patches, packed)
    return count_flops(stack.apply, shapes, packed.patches, packed)


def test_windows_cost_what_they_hold():
    assert flops((), 16) == 2 * flops((), 8)
    assert flops((), 32) == 4 * flops((), 8)
    # A full layer costs N * N where a windowed one costs N * 16: two products of two FLOPs each.
    for rows in (8, 16, 32):
        patches = rows * 8
        assert flops((3,), rows) - flops((), rows) == 4 * WIDTH * patches * (patches - 16)


def test_windows_are_linear_in_the_compiled_program():
    """By XLA's own count of one layer, element-wise work included; what it fuses differs a little."""

    def compiled(rows, full=()):
        packed = packed_patches([(1, rows, 8)])
        stack = WindowedStack(1, BLOCK, full_layers=full)
        shapes = jax.eval_shape(stack.init, jax.random.key(0), packed.patches, packed)
        return jax.jit(stack.apply).lower(shapes, packed.patches, packed).compile().cost_analysis()["flops"]

    small, middle, large = (compiled(rows) for rows in (8, 16, 32))
    np.testing.assert_allclose(large - middle, 2 * (middle - small), rtol=0.05)
    assert compiled(32, (0,)) > 3 * large


def test_parameters_are_stacked_and_named():
    packed = packed_patches()
    boxed = WindowedStack(3, BLOCK).init(jax.random.key(0), packed.patches, packed)["params"]["layers"]
    kernel = boxed["attention"]["query"]["kernel"]
    assert kernel.value.shape == (3, WIDTH, WIDTH) and kernel.names == ("layers", "embed", "heads")
    assert not np.array_equal(kernel.value[0], kernel.value[1])


def test_restore_order():
    packed = packed_patches(length=160)
    count = int(np.prod(GRIDS, axis=1).sum())
    places = jnp.arange(160.0)[None, :, None]
    np.testing.assert_array_equal(restore_order(places, packed)[0, :count, 0], packed.order[0, :count])
    stacked = restore_order(jnp.stack([places, places + 1]), packed)
    np.testing.assert_array_equal(stacked[1], stacked[0] + 1)


def test_layers_outside_the_stack_and_missing_windows_are_refused():
    packed = packed_patches()
    with pytest.raises(ValueError, match=r"full_layers \[4\] are not among the layers 0 to 3"):
        WindowedStack(4, BLOCK, full_layers=(1, 4)).init(jax.random.key(0), packed.patches, packed)
    plain = pack_patches(np.zeros((60, WIDTH), np.float32), GRIDS[:1], merge_size=2)
    plain = jax.tree.map(jnp.asarray, plain)
    with pytest.raises(ValueError, match=r"layers \[0, 2\] attend inside windows"):
        WindowedStack(3, BLOCK, full_layers=(1,)).init(jax.random.key(0), plain.patches, plain)
