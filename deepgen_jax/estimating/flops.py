"""FLOPs of a function, counted in its jaxpr: matrix products and convolutions, loops times their length.

Counted before the compiler sees the function, this is the model's own work: nothing added by sharding, nothing recomputed (what
the backward pass of attention computes again has a name scope that says so). Attention counts its whole score matrix, causal
or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from deepgen_jax.models.plain import RECOMPUTED


def count_flops(function: Callable, *args) -> float:
  """FLOPs (a multiply-add is two) of one call on arrays or ShapeDtypeStructs."""
  return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if RECOMPUTED in str(equation.source_info.name_stack):
    return 0.0
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output
  if name == "cond":
    return max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
  inner = [getattr(value, "jaxpr", value) for value in params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]
  return params.get("length", 1) * sum(map(_jaxpr_flops, inner)) if name == "scan" else sum(map(_jaxpr_flops, inner))
