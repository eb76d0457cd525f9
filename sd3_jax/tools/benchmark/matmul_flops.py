"""FLOPs of a function's matrix products and convolutions, 2 a multiply-add.

Bodies of loops count once for each iteration, which XLA's own count omits.
"""

import math
from collections.abc import Callable

import jax


def flops(function: Callable, *args) -> float:
    """FLOPs of function(*args); args may be abstract."""
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _product(eqn)
        elif eqn.primitive.name == "conv_general_dilated":
            total += _convolution(eqn)
        # A jaxpr has a scan's body once, whatever its length.
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        # Bodies of scans, branches and nested jits are parameters of their equation.
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        bodies = [getattr(x, "jaxpr", x) for x in inner if _is_jaxpr(x)]
        total += times * sum(map(_of, bodies))
    return total


def _product(eqn) -> float:
    # 2 * (elements of the result) * (length of the contracted axes); batch axes are
    # among the result's.
    (contracted, _), _ = eqn.params["dimension_numbers"]
    a = eqn.invars[0].aval.shape
    summed = math.prod(a[axis] for axis in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed


def _convolution(eqn) -> float:
    kernel = eqn.invars[1].aval.shape
    # rhs_spec[0] is the kernel's output channel axis.
    out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
