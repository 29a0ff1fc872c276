"""What an operator is: scores -> relaxed k-hot mask, with its rows and values, and what it guarantees."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Temperature = float | Tensor
Part = Literal["mask", "values"]


@dataclass(frozen=True)
class Guarantees:
    """What an operator promises; the contract tests are generated from it, so undeclared means unclaimed.

    Attributes:
        sums_to_k: The mask sums to k.
        bounded: The mask lies in [0, 1].
        monotone: A larger score never gets a smaller mask.
        shift_invariant: Adding a constant to all scores of a row changes nothing.
        hard_limit: As the temperature goes to 0 the mask goes to the hard one.
        sparse: The mask has exact zeros away from the threshold.
    """

    sums_to_k: bool = True
    bounded: bool = True
    monotone: bool = True
    shift_invariant: bool = True
    hard_limit: bool = True
    sparse: bool = False


@dataclass(frozen=True)
class Operator:
    """A relaxation of top-k: `operator(scores, k, temperature)` is its mask, `.selection(...)` its rows.

    Attributes:
        function: `(scores, k, temperature)` -> mask `(..., n)`, or rows `(..., k, n)` where `has_rows`.
            A mask function also takes k as a tensor that broadcasts with the leading dimensions.
        guarantees: What the mask promises.
        has_rows: Whether `function` yields the selection; else rows are differences of nested masks.
    """

    function: Callable[..., Tensor]
    guarantees: Guarantees
    has_rows: bool = False

    def __post_init__(self) -> None:
        # help(entropic) shows the function; object's setattr, as the dataclass is frozen.
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(self.function, name):
                object.__setattr__(self, name, getattr(self.function, name))
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(
        self, scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0, **options: Any
    ) -> Float[Tensor, "*rows n"]:
        """The relaxed mask of each row of scores."""
        temperature = _prepared(scores, k, temperature)
        output = self.function(scores, k, temperature, **options)
        return output.sum(-2) if self.has_rows else output

    def selection(
        self, scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0, **options: Any
    ) -> Float[Tensor, "*rows k n"]:
        """The relaxed one-hot of the j-th largest score, j = 1..k.

        An operator that yields only masks gives `P_j = mask(k=j) - mask(k=j-1)`; for the threshold
        operators these rows are non-negative and sum to 1.
        """
        temperature = _prepared(scores, k, temperature)
        if self.has_rows:
            return self.function(scores, k, temperature, **options)
        masks = self._nested(scores, k, temperature, **options)
        return torch.diff(masks, dim=-2, prepend=torch.zeros_like(masks[..., :1, :]))

    def values(
        self, scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0, **options: Any
    ) -> Float[Tensor, "*rows k"]:
        """The relaxed j-th largest score `<P_j, scores>`, j = 1..k."""
        temperature = _prepared(scores, k, temperature)
        column = scores.unsqueeze(-1)
        if self.has_rows:
            return (self.function(scores, k, temperature, **options) @ column).squeeze(-1)
        sums = (self._nested(scores, k, temperature, **options) @ column).squeeze(-1)
        return torch.diff(sums, dim=-1, prepend=torch.zeros_like(sums[..., :1]))

    def _nested(self, scores: Tensor, k: int, temperature: Temperature, **options: Any) -> Tensor:
        """Masks for 1, ..., k side by side: (..., k, n)."""
        if isinstance(temperature, Tensor) and temperature.dim() > 1:
            temperature = temperature.unsqueeze(-2)
        counts = torch.arange(1, k + 1, device=scores.device)
        return self.function(scores.unsqueeze(-2), counts, temperature, **options)


def operator(*, has_rows: bool = False, **guarantees: bool) -> Callable[[Callable[..., Tensor]], Operator]:
    """Declare a function an operator, with what it guarantees (the fields of `Guarantees`)."""
    return lambda function: Operator(function, Guarantees(**guarantees), has_rows)


def bound(part: "Operator | functools.partial[Tensor]") -> tuple[Operator, dict[str, Any]]:
    """The operator and its options, from an operator or a `functools.partial` of one (YAML's `_partial_`).

    Raises:
        TypeError: neither of them.
    """
    whole, options = (part.func, part.keywords) if isinstance(part, functools.partial) else (part, {})
    if not isinstance(whole, Operator):
        raise TypeError(f"operator must be one of topkbench.operators, got {whole!r}")
    return whole, dict(options)


def check(scores: Tensor, k: int, temperature: Temperature = 1.0) -> None:
    """Refuse what no operator can answer.

    Raises:
        TypeError: scores are not floating point, or k is not a whole number.
        ValueError: k outside [1, n], a temperature that is not > 0, or one that does not broadcast.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.dim() < 1:
        raise ValueError("scores must have at least one dimension (..., n), got a scalar")
    n = scores.shape[-1]
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {k!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}] for {n} scores, got {k}")
    if isinstance(temperature, Tensor):
        # Its values are not looked at: that would make an accelerator wait for the CPU at every step.
        if temperature.dim() and not _broadcasts(temperature.shape, (*scores.shape[:-1], 1)):
            raise ValueError(
                f"temperature must be a scalar or broadcast over rows: (..., 1) against scores of shape "
                f"{tuple(scores.shape)}, got shape {tuple(temperature.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def _broadcasts(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    if len(shape) > len(onto):
        return False
    return all(size in (1, target) for size, target in zip(shape[::-1], onto[::-1], strict=False))


def _prepared(scores: Tensor, k: int, temperature: Temperature) -> Temperature:
    """The temperature, checked, in the precision of the scores: it must not decide that of the mask."""
    check(scores, k, temperature)
    return temperature.to(scores.dtype) if isinstance(temperature, Tensor) else temperature
