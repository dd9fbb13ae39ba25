import inspect
import json

import numpy as np
import pytest

from vlm_jax.checkpoints import ops

RANDOM = np.random.default_rng(0)

# (operation, shapes of its sources)
CASES = [
    (ops.Identity(), [(3, 2)]),
    (ops.Identity(), [(3, 2), (4,)]),
    (ops.Transpose((1, 0)), [(3, 2)]),
    (ops.Transpose((2, 0, 3, 1)), [(3, 2, 5, 4)]),
    (ops.Reshape((4, 3), (2, 6)), [(4, 3)]),
    (ops.Permute(1, (2, 0, 1)), [(2, 3)]),
    (ops.Split(1, (1, 3)), [(2, 4, 3)]),
    (ops.Concatenate(0, (2, 3)), [(2, 4), (3, 4)]),
    (ops.Parallel(ops.Reshape((2, 2), (4,)), ops.Transpose((1, 0))), [(2, 2), (3, 5)]),
    (ops.Shared(2), [(3, 2), (3, 2)]),
    (ops.Copied(3), [(3, 2)]),
    (ops.Each(ops.fused_linear(2, 4)), [(3, 6, 5)]),
    (ops.Chain(ops.CONV2D, ops.Permute(0, (1, 0))), [(5, 3, 2, 2)]),
    (ops.patch_linear(2, 3, 5), [(5, 3, 2, 2)]),
    (ops.grouped_linear(2, (4, 2, 2), 5), [(16, 5)]),
    (ops.grouped_bias(2, (4, 2, 2)), [(16,)]),
]


def arrays_of(shapes):
    return [RANDOM.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("op", "shapes"), CASES, ids=lambda value: str(value)[:60])
def test_op_contract(op, shapes):
    arrays = arrays_of(shapes)
    arrays = [arrays[0]] * len(arrays) if isinstance(op, ops.Shared) else arrays
    results = op(*arrays)
    assert op.shapes(*shapes) == tuple(result.shape for result in results)
    assert op.inverse.shapes(*op.shapes(*shapes)) == tuple(shapes)
    for original, returned in zip(arrays, op.inverse(*results), strict=True):
        np.testing.assert_array_equal(returned, original)
    for once, twice in zip(results, op.inverse.inverse(*arrays), strict=True):
        np.testing.assert_array_equal(twice, once)


@pytest.mark.parametrize(("op", "shapes"), CASES, ids=lambda value: str(value)[:60])
def test_an_op_is_written_as_json_and_read_back(op, shapes):
    del shapes
    assert ops.from_data(json.loads(json.dumps(ops.to_data(op)))) == op


@pytest.mark.parametrize(("op", "shapes"), CASES, ids=lambda value: str(value)[:60])
def test_source_index_reads_the_block_alone(op, shapes):
    arrays = arrays_of(shapes)
    target = op(*arrays)[0]
    block = tuple(slice(size // 2, size) for size in target.shape)
    index = op.source_index(block)
    if index is None:
        assert not isinstance(op, ops.Identity | ops.Transpose)
        return
    np.testing.assert_array_equal(op(arrays[0][index])[0], target[block])


def test_every_op_is_registered_and_has_a_case():
    defined = {
        kind
        for _, kind in inspect.getmembers(ops, inspect.isclass)
        if issubclass(kind, ops.Op) and not inspect.isabstract(kind)
    }
    assert set(ops.OPS.values()) == defined
    assert {type(op) for op, _ in CASES} == defined


def test_linear_kernel_gives_the_product_of_the_torch_weight():
    x, weight = arrays_of([(7, 5), (3, 5)])
    (kernel,) = ops.LINEAR(weight)
    np.testing.assert_array_equal(np.einsum("ni,oi->no", x, weight), np.einsum("ni,io->no", x, kernel))


def test_conv2d_and_patch_linear_put_every_weight_in_its_place():
    (weight,) = arrays_of([(5, 3, 2, 4)])
    (kernel,) = ops.CONV2D(weight)
    assert kernel.shape == (2, 4, 3, 5)
    for o, i, y, x in np.ndindex(*weight.shape):
        assert kernel[y, x, i, o] == weight[o, i, y, x]
    (weight,) = arrays_of([(5, 3, 2, 2)])
    (flat,) = ops.patch_linear(2, 3, 5)(weight)
    for o, i, y, x in np.ndindex(*weight.shape):
        assert flat[(y * 2 + x) * 3 + i, o] == weight[o, i, y, x]


def test_fused_rows_stand_one_part_under_the_other():
    query, key, value = ops.fused_linear(4, 2, 2)(np.arange(8)[:, None] * np.ones((8, 3)))
    assert query.shape == (3, 4)
    assert [row[0].tolist() for row in (query, key, value)] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert [part.tolist() for part in ops.fused_bias(4, 2, 2)(np.arange(8))] == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_grouped_rows_come_group_by_group():
    # Two key-value heads of width 1, each after its own two query heads.
    rows = np.array(["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"])
    query, key, value = ops.grouped_bias(2, (2, 1, 1))(rows)
    assert [query.tolist(), key.tolist(), value.tolist()] == [
        ["q0", "q1", "q2", "q3"],
        ["k0", "k1"],
        ["v0", "v1"],
    ]
    kernels = ops.grouped_linear(2, (2, 1, 1), 1)(rows[:, None])
    assert [kernel[0].tolist() for kernel in kernels] == [query.tolist(), key.tolist(), value.tolist()]


@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        (ops.LINEAR, [(3,)], "expected 2 axes, got the shape"),
        (ops.Reshape((4, 3), (12,)), [(3, 4)], r"expected the shape \(4, 3\), got \(3, 4\)"),
        (ops.Permute(0, (1, 0)), [(3, 2)], "expected 2 rows along axis 0"),
        (ops.Permute(1, (1, 0)), [(2,)], "expected 2 rows along axis 1"),
        (ops.Split(0, (2, 3)), [(6, 2)], "5 rows on axis 0"),
        (ops.Split(1, (2, 3)), [(5,)], "5 rows on axis 1"),
        (ops.Split(0, (2, 3)), [(5,), (5,)], "expected one array"),
        (ops.Concatenate(0, (2, 3)), [(3, 2), (2, 2)], "differ only on axis 0"),
        (ops.Concatenate(0, (2, 3)), [(2, 2), (3, 4)], "differ only on axis 0"),
        (ops.Concatenate(0, (2, 3)), [(2,), ()], "differ only on axis 0"),
        (ops.Parallel(ops.LINEAR), [(2, 2), (2, 2)], "expected 1 arrays, got 2"),
        (ops.Shared(2), [(2, 2), (2, 3)], "2 arrays of one shape"),
        (ops.Shared(2), [(2, 2)], "2 arrays of one shape"),
        (ops.Copied(2), [(2, 2), (2, 2)], "expected one array"),
        (ops.Each(ops.LINEAR), [()], "equal leading axes"),
        (ops.Each(ops.Concatenate(0, (1, 1))), [(2, 1), (3, 1)], "equal leading axes"),
        (ops.Each(ops.LINEAR), [(3, 2)], "expected 2 axes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(op, shapes, message):
    with pytest.raises(ValueError, match=message):
        op.shapes(*shapes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.Transpose((0, 2)), "permutation of 0 .. 1"),
        (lambda: ops.Permute(0, (1, 1)), "permutation of 0 .. 1"),
        (lambda: ops.Reshape((2, 3), (5,)), "6 elements cannot become 5"),
    ],
)
def test_operations_without_an_inverse_cannot_be_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
