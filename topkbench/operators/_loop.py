"""Steps over and over: a loop of Python's, or of the compiled program.

A compiler that follows Python's loop writes down every step of it: 200 Sinkhorn iterations are 200 copies,
which take minutes to compile, and none may end early. On a CPU the loop is handed to it as one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# By name, as a compiler does not follow subscripts of types where a function within a function is defined.
State = tuple[Tensor, ...]
Step = tuple[Tensor, State]


def repeat(step: Callable[..., State], state: State, times: int) -> State:
    """The state after so many steps.

    Args:
        step: From a state to the next, of the same shapes and dtypes; it has no derivative here.
        state: To begin with.
        times: How many.
    """
    if as_one_loop(*state):
        return _compiled(lambda *state: (None, step(*state)), state, times)
    for _ in range(times):
        state = step(*state)
    return state


def settle(step: Callable[..., Step], state: State, most: int, *, look: bool) -> State:
    """The state after the step at which all has settled.

    Args:
        step: From a state to what has settled by then, boolean, and the next, of the same shapes and dtypes.
        state: To begin with.
        most: How many steps, at most.
        look: Whether one may look at what has settled; if not, all steps are made.
    """
    if as_one_loop(*state):
        return _compiled(step, state, most)
    for _ in range(most):
        settled, state = step(*state)
        if look and settled.all():
            break
    return state


def constant(number: float) -> float:
    """The number, as a constant to a compiler: the steps of one loop may look at none that changes."""
    return float.fromhex(number.hex())


def own(part: Tensor) -> Tensor:
    """A copy from the start of memory of its own, with plain strides: compiled programs count on that."""
    return part.clone(memory_format=torch.contiguous_format)


def as_one_loop(*parts: Tensor) -> bool:
    """Whether a compiler is at work that takes a loop as one: for a CPU, and not below vmap."""
    if not torch.compiler.is_compiling():
        return False
    return all(part.device.type == "cpu" and not torch._C._functorch.is_batchedtensor(part) for part in parts)


def _compiled(step: Callable[..., tuple[Tensor | None, State]], state: State, most: int) -> State:
    from torch._higher_order_ops import while_loop

    def unsettled(count: Tensor, done: Tensor, *_: Tensor) -> Tensor:
        return (count < most) & ~done

    def stepped(count: Tensor, done: Tensor, *state: Tensor) -> State:
        settled, following = step(*state)
        return count + 1, done.clone() if settled is None else settled.all(), *map(own, following)

    began: Any = (torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.bool), *map(own, state))
    return tuple(while_loop(unsettled, stepped, began)[2:])
