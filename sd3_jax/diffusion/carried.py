"""Velocities with a state that a solver's loop carries from step to step."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

Stateful = Callable[[Array, Array, PyTree], tuple[Array, PyTree]]


class Remembering(NamedTuple):
    """A network that reads what it left in the step before: velocity(x, t, cond) of a
    function (x, t, cond, state) -> (v, state), which is called once a step.

    initial(x) is the state before the first step, for rows like those of x.
    """

    function: Callable[[Array, Array, PyTree, PyTree], tuple[Array, PyTree]]
    initial: Callable[[Array], PyTree]


class Carried:
    """velocity(x, t) of a function (x, t, state) -> (v, state).

    The state is that of the steps before. A step's first evaluation changes it; later
    ones, such as Heun's second slope, read what the first left. A solver calls `enter`
    at the start of a step and `leave` at its end, and carries what these exchange.
    """

    def __init__(self, function: Stateful, initial: Callable[[Array], PyTree]):
        self.function, self.initial = function, initial  # of the solver's first x
        # Python holds the state within a step alone. Between steps the loop carries it,
        # so that no tracer outlives its trace.
        self.state, self.changed = None, True
        self.final: PyTree = None  # after the last step, once a loop has run

    def __call__(self, x: Array, t: Array) -> Array:
        # Solvers that never call `enter`, such as adaptive, would otherwise guide each
        # step as if it were the first.
        if self.state is None:
            raise ValueError("this solver does not carry the guidance's state")
        v, state = self.function(x, t, self.state)
        # Later evaluations may lie inside a branch, which no new state may leave.
        if not self.changed:
            self.state, self.changed = state, True
        return v

    def enter(self, state: PyTree) -> None:
        self.state, self.changed = state, False

    def leave(self) -> PyTree:
        state, self.state = self.state, None
        return state


def initial(velocity: Any, x: Array) -> PyTree:
    """The state with which a solver's loop begins; None of a velocity without one."""
    return velocity.initial(x) if isinstance(velocity, Carried) else None
