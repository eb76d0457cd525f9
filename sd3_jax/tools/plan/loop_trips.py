"""How often the loops of a compiled program run."""

import math
import re
from collections.abc import Mapping

from sd3_jax.tools.plan.hlo import Computation, Instruction, Module


def trips(loop: Instruction, home: Computation, module: Module) -> int | None:
    """How often the body of a loop, an instruction of `home`, runs; None if unknown.

    The count is XLA's, or follows from the counter's start, its step, and the bound in
    the condition. Rings inside products step by 2, and a loop with a peeled iteration
    starts at 1.
    """
    # Most loops are scans, for which XLA writes the count into the backend config.
    known = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = module[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = module[loop.attribute(r"body=%?([\w.\-]+)")]
    # Otherwise the condition is "counter < bound", and the count follows from start,
    # bound and step. All costs of a body are multiplied by it.
    compare = next((x for x in condition if x.opcode == "compare"), None)
    constants = _constants(condition)
    if compare is None:  # it is in a fusion: the only number there is the bound
        inner = [_constants(c) for x in condition for c in module.reached(x)]
        bounds = [n for numbers in (constants, *inner) for n in numbers.values()]
        return max(bounds, default=None)
    # Either operand of the comparison may be the constant.
    bound = next((constants[n] for n in compare.operands if n in constants), None)
    read = [condition.by_name.get(name) for name in compare.operands]
    counter = next((x for x in read if x and x.opcode == "get-tuple-element"), None)
    if bound is None or counter is None:
        return None
    place = int(counter.attribute(r"index=(\d+)"))
    step = _step(body, place)
    # A counter that is not advanced by a constant has no count that can be read off.
    if not step:
        return None
    # Iterations until the counter reaches the bound; "<=" runs once more.
    away = (bound - _start(loop, place, home)) / step
    ends_on = compare.attribute(r"direction=(\w+)") in ("LE", "GE")
    turns = math.floor(away) + 1 if ends_on else math.ceil(away)
    return turns if turns >= 0 else None


def _step(body: Computation, place: int) -> int:
    """What a turn adds to element `place` of a loop's state; 0 if unknown."""
    moved = body.by_name.get(body.root.operands[place])
    if moved is None or moved.opcode not in ("add", "subtract"):
        return 0
    constants = _constants(body)
    step = next((constants[n] for n in moved.operands if n in constants), 0)
    return -step if moved.opcode == "subtract" else step


def _start(loop: Instruction, place: int, home: Computation) -> int:
    """The value that element `place` of a loop's state begins with; 0 if unknown."""
    x = home.by_name.get(loop.operands[0])
    if x is not None and x.opcode == "tuple":
        x = home.by_name.get(x.operands[place])
        # The compiler puts copies between the start value and the loop's tuple.
        while x is not None and x.opcode in ("copy", "bitcast"):
            x = home.by_name.get(x.operands[0])
        return _constants(home).get(x.name, 0) if x is not None else 0
    return 0


def _constants(computation: Computation) -> Mapping[str, int]:
    return {
        x.name: int(number[1])
        for x in computation
        if x.opcode == "constant" and (number := re.match(r"\((-?\d+)\)", x.attributes))
    }
