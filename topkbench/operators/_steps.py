"""How far a comparator exchanges two values: F((a - b) / temperature), a smooth step from 0 to 1."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from topkbench.operators._contract import Temperature

GUARD = 1e-10  # in |v| + GUARD, so that the power of a difference of 0 has a derivative


@dataclass(frozen=True)
class Step:
    """A distribution function F, symmetric about 0.

    Attributes:
        cdf: `(v, out)` -> F(v), written to `out` if there is one.
        slope: `(v, F(v))` -> F'(v).
        power: F depends on the difference d of two scores through `d^power / temperature`.
    """

    cdf: Callable[..., Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    power: float = 1.0

    def scaled(self, scores: Tensor, temperature: Temperature) -> Tensor:
        """Scores in units in which F has no temperature left."""
        return scores / (temperature if self.power == 1 else temperature ** (1 / self.power))


def _phi(v: Tensor, art: float) -> Tensor:
    return v / (v.abs() + GUARD) ** art


def _phi_cdf(v: Tensor, out: Tensor | None = None, *, art: float) -> Tensor:
    return torch.sigmoid(_phi(v, art), out=out)


def _phi_slope(v: Tensor, c: Tensor, art: float) -> Tensor:
    size = v.abs()
    return c * (1 - c) * (size + GUARD) ** (-art - 1) * ((1 - art) * size + GUARD)


def _reciprocal(v: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.add(v / (2 * v.abs() + 4), 0.5, out=out)


def _cauchy(v: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.add(v.atan() / math.pi, 0.5, out=out)


def _optimal(v: Tensor, out: Tensor | None = None) -> Tensor:
    tail = torch.copysign(0.25 - 1 / (16 * v.abs().clamp(min=0.25)), v)
    return torch.add(v.clamp(-0.25, 0.25) + 0.5, tail, out=out)


def _constant(step: Step) -> Callable[[float], Step]:
    return lambda _: step


STEPS: dict[str, Callable[[float], Step]] = {
    "logistic": _constant(Step(torch.sigmoid, lambda _, c: torch.addcmul(c, c, c, value=-1))),
    "logistic_phi": lambda art: Step(partial(_phi_cdf, art=art), partial(_phi_slope, art=art), power=1 - art),
    "gaussian": _constant(Step(torch.special.ndtr, lambda v, _: (v * v / -2).exp() / math.sqrt(2 * math.pi))),
    "reciprocal": _constant(Step(_reciprocal, lambda v, _: 1 / (v.abs() + 2) ** 2)),
    "cauchy": _constant(Step(_cauchy, lambda v, _: 1 / (math.pi * (1 + v * v)))),
    "optimal": _constant(Step(_optimal, lambda v, _: 1 / (16 * v.abs().clamp(min=0.25) ** 2))),
}


def step_named(name: str, art: float) -> Step:
    """The step of that name; `art` is the power of activation replacement, of "logistic_phi" alone.

    Raises:
        ValueError: no step has that name, or art is outside [0, 1).
    """
    if name not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {name!r}")
    if not 0 <= art < 1:
        raise ValueError(f"art must be in [0, 1), got {art}")
    return STEPS[name](art)
