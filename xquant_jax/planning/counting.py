"""Operations of a traced function: the multiplications and additions of its matrix products.

They are counted in the program itself, so no formula of a method can differ from what it computes. What works element
by element (dequantization, RoPE, softmax) is not counted: it is bound by other units.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Operations(NamedTuple):
    """Operations done once, and those of one round of a loop whose rounds are known at run time only."""

    once: int
    per_round: int

    def plus(self, other: "Operations", times: int = 1) -> "Operations":
        return Operations(self.once + times * other.once, self.per_round + times * other.per_round)


def count(jaxpr: Any) -> Operations:
    """Counts a jaxpr, `jax.make_jaxpr(f)(*shapes)`. Loops of known length count as often as they run."""
    total = Operations(0, 0)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        parts = [count(inner) for inner in _inner(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                total = total.plus(Operations(_matrix_product(equation), 0))
            case "scan":
                total = total.plus(parts[0], equation.params["length"])
            case "while":
                once = sum(part.once + part.per_round for part in parts)
                total = total.plus(Operations(0, once))
            case "cond":
                total = total.plus(max(parts, key=lambda part: part.once + part.per_round))
            case _:
                for part in parts:
                    total = total.plus(part)
    return total


def _matrix_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns"):
                yield part
