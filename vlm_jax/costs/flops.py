"""FLOPs of a function, counted on its jaxpr: exact for products, scans and remat included."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from vlm_jax.costs.kernels import kernel_flops
from vlm_jax.layers.attention import written_out
from vlm_jax.types import Params, Tree

KERNEL = "pallas_call"
# Primitives that are counted.
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated", KERNEL)


def count_flops(function: Callable[..., Tree], *args: Tree, **kwargs: Tree) -> int:
    """Floating-point operations of the matrix products and convolutions of one call.

    A multiply and its add count as two. Element-wise operations (norms, softmax, activations) are not
    counted, as is usual for model FLOPs. Attention is counted as its two products,
    in full, whichever kernel would run it. Operations whose results are unused are not counted: XLA removes
    them as well. A loop of unknown length cannot be counted and raises an error.

    Args:
      function: any traceable function.
      *args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
      **kwargs: the same, by name.

    Raises:
      ValueError: the function contains a `while_loop`.
    """
    return sum(flops_of(equation) * times for equation, times in products(function, *args, **kwargs))


def products(function: Callable[..., Tree], *args: Tree, **kwargs: Tree) -> list[tuple[JaxprEqn, int]]:
    """The equations of a call that are matrix products or convolutions, each with the number of times it runs.

    Args:
      function: any traceable function.
      *args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
      **kwargs: the same, by name.

    Returns:
      Equations of a jaxpr; `equation.primitive.bind(*operands, **equation.params)` runs one. Of
      a conditional only the most expensive branch is included.

    Raises:
      ValueError: the function contains a `while_loop`.
    """
    with written_out():
        jaxpr = jax.make_jaxpr(function)(*args, **kwargs).jaxpr
    return products_of(jaxpr)


def products_of(jaxpr: Any) -> list[tuple[JaxprEqn, int]]:
    """`products` of a jaxpr, as it was traced: kernels of attention count as `costs.kernels` says.

    Raises:
      ValueError: it contains a `while_loop`, or a kernel of unknown cost.
    """
    return _of_jaxpr(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def num_devices(equation: JaxprEqn) -> int:
    """Devices that run the inside of a `shard_map`, which has the shapes of one; 1 for other equations."""
    if equation.primitive.name != "shard_map":
        return 1
    mesh = equation.params["mesh"]
    manual = equation.params.get("newly_manual_axes", equation.params.get("manual_axes", ()))
    return math.prod(mesh.shape[axis] for axis in manual)


def flops_of(equation: Any) -> int:
    """FLOPs of one run of an equation of `PRODUCTS`."""
    if equation.primitive.name == KERNEL:
        return kernel_flops(equation)
    out, params = equation.outvars[0].aval.shape, equation.params
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[i] for i in contracting)
    if equation.primitive.name == "ragged_dot_general":  # each row of the left operand times the kernel of one group
        dims = params["ragged_dot_dimension_numbers"]
        (_, contracting), (_, batch) = dims.dot_dimension_numbers
        shared = {*contracting, *batch, *dims.rhs_group_dimensions}
        left, right = (operand.aval.shape for operand in equation.invars[:2])
        return 2 * math.prod(left) * math.prod(size for i, size in enumerate(right) if i not in shared)
    kernel, features = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(out) * math.prod(kernel) // kernel[features]


def _of_jaxpr(jaxpr: Tree) -> list[tuple[JaxprEqn, int]]:
    return [found for equation in jaxpr.eqns for found in _of_equation(equation)]


def _of_equation(equation: JaxprEqn) -> list[tuple[JaxprEqn, int]]:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return [(equation, 1)]
    if name == "while":
        raise ValueError("the length of a while_loop is unknown; count the FLOPs of its body instead")
    if name == "cond":
        branches = [_of_jaxpr(branch.jaxpr) for branch in params["branches"]]
        return max(branches, key=lambda found: sum(flops_of(inner) * times for inner, times in found))
    length = params["length"] if name == "scan" else num_devices(equation)
    inner = [found for value in _jaxprs(params) for found in _of_jaxpr(getattr(value, "jaxpr", value))]
    return [(found, times * length) for found, times in inner]


def _jaxprs(params: Params) -> list[Tree]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                found.append(item)
    return found
