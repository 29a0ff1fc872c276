"""Pairs of functions of n scores that must agree, in value and in Jacobian."""

from collections.abc import Callable
from typing import NamedTuple

import entmax
import torch
from torch import Tensor

from topkbench.operators import entropic, hard_mask, hard_values, identity, softmax, sparsemax

THRESHOLD = (entropic, sparsemax)


class Identity(NamedTuple):
    name: str
    n: int
    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]


def _half_difference(s: Tensor) -> Tensor:
    return (s - s.flip(-1)) / 2


def _second_softmax(s: Tensor, temperature: float) -> Tensor:
    v = s / temperature
    return (v + torch.log1p(-v.softmax(-1)) / temperature).softmax(-1)


def _entropic_optimum(s: Tensor) -> Tensor:
    m = entropic(s, 2, 0.7)
    return m @ s + 0.7 * (torch.special.entr(m) + torch.special.entr(1 - m)).sum()


def _sparsemax_optimum(s: Tensor) -> Tensor:
    m = sparsemax(s, 2, 0.7)
    return m @ s - 0.7 * (m @ m) / 2


def _constant(value: float) -> Callable[[Tensor], Tensor]:
    return lambda s: torch.zeros_like(s) * s + value


IDENTITIES = [
    Identity(
        "entropic of two: sigmoid", 2, lambda s: entropic(s, 1), lambda s: _half_difference(s).sigmoid()
    ),
    Identity(
        "sparsemax of two: ramp",
        2,
        lambda s: sparsemax(s, 1),
        lambda s: (_half_difference(s) + 0.5).clamp(0, 1),
    ),
    Identity(
        "sparsemax k=1: entmax",
        6,
        lambda s: sparsemax(s, 1, 0.7),
        lambda s: entmax.sparsemax(s / 0.7, dim=-1),
    ),
    # k < n, last dimension, one row: entmax 1.3 mistakes the others.
    *(
        Identity(
            f"sparsemax k={k}: entmax",
            6,
            lambda s, k=k: sparsemax(s, k, 0.7),
            lambda s, k=k: entmax.budget_bisect(s / 0.7, budget=k),
        )
        for k in (1, 2, 5)
    ),
    # Spread by less than a temperature, nothing is clipped.
    Identity(
        "sparsemax at high temperature: affine",
        6,
        lambda s: sparsemax(s, 3, 20.0),
        lambda s: 0.5 + (s - s.mean()) / 20,
    ),
    Identity("softmax k=1: softmax", 6, lambda s: softmax(s, 1, 0.7), lambda s: (s / 0.7).softmax(-1)),
    Identity(
        "softmax, second row",
        6,
        lambda s: softmax.selection(s, 2, 0.7)[1],
        lambda s: _second_softmax(s, 0.7),
    ),
    # a (1 - a) is the same for both.
    Identity("softmax of two, second row: half", 2, lambda s: softmax.selection(s, 2)[1], _constant(0.5)),
    # The derivative of an optimum is that of the objective with the solution held fixed.
    Identity(
        "entropic: gradient of its optimum",
        6,
        lambda s: entropic(s, 2, 0.7),
        torch.func.grad(_entropic_optimum),
    ),
    Identity(
        "sparsemax: gradient of its optimum",
        6,
        lambda s: sparsemax(s, 2, 0.7),
        torch.func.grad(_sparsemax_optimum),
    ),
    *(
        Identity(
            f"{op.__name__}: complement",
            6,
            lambda s, op=op, k=k: op(s, k, 0.7),
            lambda s, op=op, k=k: 1 - op(-s, 6 - k, 0.7),
        )
        for op in THRESHOLD
        for k in (1, 2, 5)
    ),
    *(
        Identity(
            f"{op.__name__}: temperature is scale",
            6,
            lambda s, op=op: op(s, 2, 0.7),
            lambda s, op=op: op(s / 0.7, 2),
        )
        for op in THRESHOLD
    ),
    *(
        Identity(f"{op.__name__} k=n: all ones", 6, lambda s, op=op: op(s, 6, 0.7), _constant(1))
        for op in THRESHOLD
    ),
    *(
        Identity(
            f"{op.__name__} k=n: values sum", 6, lambda s, op=op: op.values(s, 6).sum(), lambda s: s.sum()
        )
        for op in THRESHOLD
    ),
    *(
        Identity(
            f"{op.__name__} at infinite temperature", 6, lambda s, op=op: op(s, 2, 1e12), _constant(2 / 6)
        )
        for op in (entropic, sparsemax, softmax)
    ),
    Identity("identity: scores", 6, lambda s: identity(s, 2, 0.7), lambda s: s / 0.7),
    Identity("hard values: sorted", 6, lambda s: hard_values(s, 6), lambda s: s.sort(descending=True).values),
    Identity(
        "hard values: taken by the mask",
        6,
        lambda s: hard_values(s, 2).sum(),
        lambda s: (hard_mask(s, 2) * s).sum(),
    ),
]
