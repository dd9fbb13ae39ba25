"""FLOPs of a training step as of model FLOPs utilisation: those that the gradient needs, rematerialised ones not.

Source: Chowdhery et al. 2022 (PaLM), appendix B, counted product by product, so that frozen parts, convolutions and
towers of any kind are included: a product runs once forward, and backward once for each of its operands that depends
on a trained parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from vlm_jax.costs.flops import KERNEL, PRODUCTS, flops_of, num_devices
from vlm_jax.layers.attention import written_out
from vlm_jax.types import Tree

Counted = tuple[int, list[bool]]  # FLOPs, and which results depend on a trained parameter


def training_flops(loss: Callable[..., jax.Array], trained: Tree, *args: Tree) -> int:
    """Floating-point operations of the loss and of its gradient with respect to the first argument.

    Matrix products and convolutions are counted, a multiply and its add as two. A product whose result is only read
    through `stop_gradient` is counted as if it had a gradient.

    Args:
      loss: a traceable function (trained, *args) -> scalar.
      trained: arrays or `jax.ShapeDtypeStruct`s of the trained parameters; nothing is computed.
      *args: the same of everything else.

    Raises:
      ValueError: the function contains a `while_loop`.
    """
    with written_out():
        jaxpr = jax.make_jaxpr(loss)(trained, *args).jaxpr
    jaxpr = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]
    num_trained = len(jax.tree.leaves(trained))
    return _of_jaxpr(jaxpr, [number < num_trained for number in range(len(jaxpr.invars))])[0]


def _of_jaxpr(jaxpr: Any, active: Sequence[bool]) -> Counted:
    depends = dict(zip(jaxpr.invars, active, strict=True))
    total = 0
    for equation in jaxpr.eqns:
        given = [not isinstance(atom, Literal) and depends.get(atom, False) for atom in equation.invars]
        flops, found = _of_equation(equation, given)
        total += flops
        for variable, value in zip(equation.outvars, found, strict=True):
            depends[variable] = value and jax.numpy.issubdtype(variable.aval.dtype, jax.numpy.inexact)
    return total, [not isinstance(atom, Literal) and depends.get(atom, False) for atom in jaxpr.outvars]


def _of_equation(equation: JaxprEqn, active: list[bool]) -> Counted:
    name, count = equation.primitive.name, len(equation.outvars)
    if name == KERNEL:
        raise ValueError(f"the kernel '{equation.params.get('name')}' is not written out, so its gradient is unknown")
    if name in PRODUCTS:
        return flops_of(equation) * (1 + sum(active[:2])), [any(active)] * count
    if name == "stop_gradient":
        return 0, [False] * count
    if name == "while":
        raise ValueError("the length of a while_loop is unknown; count the FLOPs of its body instead")
    if name == "scan":
        return _of_scan(equation.params, active)
    if name == "cond":
        found = [_of_jaxpr(branch.jaxpr, active[1:]) for branch in equation.params["branches"]]
        return max(flops for flops, _ in found), [any(out) for out in zip(*(out for _, out in found), strict=True)]
    inner = equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
    if inner is None:
        return 0, [any(active)] * count
    flops, found = _of_jaxpr(getattr(inner, "jaxpr", inner), active)
    return flops * num_devices(equation), found


def _of_scan(params: Any, active: list[bool]) -> Counted:
    """A loop, whose carry may come to depend on a trained parameter in a later iteration."""
    consts, carries = params["num_consts"], params["num_carry"]
    active = list(active)
    while True:
        flops, out = _of_jaxpr(params["jaxpr"].jaxpr, active)
        carry = [one or other for one, other in zip(active[consts : consts + carries], out[:carries], strict=True)]
        if carry == active[consts : consts + carries]:
            return flops * params["length"], [*carry, *out[carries:]]
        active[consts : consts + carries] = carry
