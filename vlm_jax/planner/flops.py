"""FLOPs of a function, counted on its jaxpr: exact for products, scans and remat included."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from vlm_jax.layers.attention import written_out


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of the matrix products and convolutions of one call.

    A multiply and its add count as two. Element-wise work (norms, softmax, activations) is not
    counted, as is the habit where model FLOPs are reported. Attention is counted as its two products,
    in full, whichever kernel would run it. What no result depends on is not counted: XLA leaves it
    out as well. A loop of unknown length cannot be counted and is refused.

    Args:
      function: any traceable function.
      *args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
      **kwargs: the same, by name.

    Raises:
      ValueError: the function holds a `while_loop`.
    """
    with written_out():
        jaxpr = jax.make_jaxpr(function)(*args, **kwargs).jaxpr
    return _of_jaxpr(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[i] for i in contracting)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(out) * math.prod(kernel) // kernel[features]
    if name == "while":
        raise ValueError("a while_loop has no length that can be known; count the FLOPs of its body instead")
    if name == "cond":
        return max(_of_jaxpr(branch.jaxpr) for branch in params["branches"])
    inner = sum(_of_jaxpr(getattr(value, "jaxpr", value)) for value in _jaxprs(params))
    return inner * params["length"] if name == "scan" else inner


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                found.append(item)
    return found
