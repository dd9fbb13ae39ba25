"""FLOPs of Pallas kernels, whose bodies a jaxpr shows once, for one block."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

LANES, SUBLANES = 128, 8  # of a tile, along which the integers of a position are repeated


def attention_flops(equation: JaxprEqn, of_keys: int, of_values: int) -> int:
    """FLOPs of an attention kernel: products of every query with every key, masked or not, as is usual.

    Args:
      equation: whose first three arrays of floats with heads are queries [.., Q, T, H], keys [.., K, S, H] and values
        [.., K, S, V].
      of_keys: products over H.
      of_values: products over V.
    """
    given: list[Any] = [variable.aval for variable in equation.invars]
    queries, keys, values = [array.shape for array in given if _is_float(array) and array.ndim >= 3][:3]
    pairs = math.prod(queries[:-1]) * keys[-2]
    return 2 * pairs * (of_keys * queries[-1] + of_values * values[-1])


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


# Pattern of a kernel's name -> its count: JAX's splash attention, and `layers.attention.flash`. Products are QK' and PV
# forward; QK', dO V' and dS K for the gradient of queries; QK', dO V', P' dO and dS' Q for that of keys and values.
KERNELS: dict[str, Callable[[JaxprEqn], int]] = {
    r"splash_m[hq]a_fwd.*|flash_forward": lambda equation: attention_flops(equation, 1, 1),
    r"splash_m[hq]a_dq.*|flash_backward_queries": lambda equation: attention_flops(equation, 2, 1),
    r"splash_m[hq]a_dkv.*|flash_backward_keys": lambda equation: attention_flops(equation, 2, 2),
}


def kernel_flops(equation: JaxprEqn) -> int:
    """FLOPs of one call of a Pallas kernel.

    Raises:
      ValueError: neither the kernel states its cost, nor is its name in `KERNELS`.
    """
    stated, name = equation.params.get("cost_estimate"), str(equation.params.get("name"))
    if stated is not None:
        return int(stated.flops)
    for pattern, count in KERNELS.items():
        if re.fullmatch(pattern, name):
            return count(equation)
    raise ValueError(f"the FLOPs of the kernel '{name}' are unknown; give it a cost_estimate, or add it to KERNELS")


def visible_flops(equation: JaxprEqn, share: float) -> float:
    """FLOPs of one call of an attention kernel for the pairs of queries and keys that its mask leaves.

    Segments, branches and groups are not known before the step runs, and leave every pair here.

    Args:
      equation: of a kernel.
      share: of the pairs that the masks of `layers.attention.flash` leave, which are data of the step.
    """
    name, flops = str(equation.params.get("name")), kernel_flops(equation)
    if name.startswith("flash_"):
        return share * flops
    if name.startswith("splash_") and _is_causal(equation, name):
        length = _queries(equation)
        return flops * (length + 1) / (2 * length)
    return float(flops)


def _queries(equation: JaxprEqn) -> int:
    given: list[Any] = [variable.aval for variable in equation.invars]
    return next(array.shape[-2] for array in given if _is_float(array) and array.ndim >= 3)


def _is_causal(equation: JaxprEqn, name: str) -> bool:
    """Whether JAX's kernel has the positions of its queries beside the segments: it computes a causal mask of them."""
    given: list[Any] = [variable.aval for variable in equation.invars]
    floats = [array for array in given if _is_float(array) and array.ndim >= 3]
    lengths = {floats[0].shape[-2], floats[1].shape[-2]}
    shapes = [array.shape[-2:] for array in given if not _is_float(array) and array.ndim >= 2]
    rows = sum((a in lengths and b == LANES) or (a == SUBLANES and b in lengths) for a, b in shapes)
    return rows > 2 * ("_segmented" in name)
