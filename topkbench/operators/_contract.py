"""What an operator is: scores -> relaxed k-hot mask, with its rows and values, and what it guarantees."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Temperature = float | Tensor
Part = Literal["mask", "values"]
LIMIT = 8 << 30  # bytes; no single tensor of an operator may be larger


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
        uniform_limit: As the temperature goes to infinity every entry of the mask goes to k/n.
        infinite: One score of -inf is never taken, one of +inf always, and gradients stay finite.
        rows_sum_to_1: Each row of the selection is non-negative and sums to 1.
        equivariant: Permuting scores permutes mask and rows, not values; gradients too where no scores tie.
        ties: Equal scores get equal entries in every row of the selection.
        gradient: The gradient is the derivative; else a part of it is held constant on purpose.
        twice: The second derivative is that of the first (double backward).
    """

    sums_to_k: bool = True
    bounded: bool = True
    monotone: bool = True
    shift_invariant: bool = True
    hard_limit: bool = True
    sparse: bool = False
    uniform_limit: bool = True
    infinite: bool = True
    rows_sum_to_1: bool = True
    equivariant: bool = True
    ties: bool = True
    gradient: bool = True
    twice: bool = True


@dataclass(frozen=True)
class About:
    """What the table of methods says.

    Attributes:
        family: Which operators are its kin.
        cost: Time for one row of n scores, and memory where that is more than n.
        source: Authors and year.
        checked: What the tests hold it against, but for finite differences: references of ours in words,
            public packages by name.
    """

    family: str = ""
    cost: str = ""
    source: str = ""
    checked: str = ""


@dataclass(frozen=True)
class Operator:
    """A relaxation of top-k: `operator(scores, k, temperature)` is its mask, `.selection(...)` its rows.

    Attributes:
        function: `(scores, k, temperature)` -> mask `(..., n)`, or rows `(..., k, n)` where `has_rows`.
            A mask function also takes k as a tensor that broadcasts with the leading dimensions.
        guarantees: What the mask promises.
        has_rows: Whether `function` yields the selection, row j whatever k (or, with `streamed`, of that k);
            else rows are differences of nested masks.
        streamed: The mask, also for a tensor k, where rows need not all be there at once to add up to it.
        about: What the table of methods says of it.
    """

    function: Callable[..., Tensor]
    guarantees: Guarantees
    has_rows: bool = False
    streamed: Callable[..., Tensor] | None = None
    about: About = About()

    def __post_init__(self) -> None:
        # help(entropic) shows the function; object's setattr, as the dataclass is frozen.
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(self.function, name):
                object.__setattr__(self, name, getattr(self.function, name))
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(
        self,
        scores: Float[Tensor, "*rows n"],
        k: int | Int[Tensor, "*ks"],
        temperature: Temperature = 1.0,
        **options: Any,
    ) -> Float[Tensor, "*rows n"]:
        """The relaxed mask of each row of scores; a tensor k `(...)` gives each row its own.

        A tensor k broadcasts with the leading dimensions. Its values are looked at on the CPU.
        """
        return self._computed(self._mask, scores, k, temperature, options)

    def selection(
        self, scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0, **options: Any
    ) -> Float[Tensor, "*rows k n"]:
        """The relaxed one-hot of the j-th largest score, j = 1..k.

        An operator that yields only masks gives `P_j = mask(k=j) - mask(k=j-1)`; for the threshold
        operators these rows are non-negative and sum to 1.
        """
        _check_one(k)
        return self._computed(self._selection, scores, k, temperature, options)

    def values(
        self, scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0, **options: Any
    ) -> Float[Tensor, "*rows k"]:
        """The relaxed j-th largest score `<P_j, scores>`, j = 1..k."""
        _check_one(k)
        return self._computed(self._values, scores, k, temperature, options)

    def _computed(
        self,
        part: Callable[..., Tensor],
        scores: Tensor,
        k: int | Tensor,
        temperature: Temperature,
        options: Any,
    ) -> Tensor:
        """A part, in float32 at least: half precision and autocast are too coarse for sums."""
        check(scores, k, temperature)
        automatic = torch.is_autocast_enabled(scores.device.type)
        half = scores.dtype in (torch.float16, torch.bfloat16)
        precise = scores.float() if half else scores
        if isinstance(temperature, Tensor):  # it must not decide the precision of the mask
            temperature = temperature.to(precise.dtype)
        if not automatic:
            return part(precise, k, temperature, options).to(scores.dtype)
        with torch.autocast(scores.device.type, enabled=False):
            return part(precise, k, temperature, options)

    def _mask(self, scores: Tensor, k: int | Tensor, temperature: Temperature, options: Any) -> Tensor:
        if self.streamed is not None:
            return self.streamed(scores, k, temperature, **options)
        if not self.has_rows:
            return self.function(scores, k, temperature, **options)
        if isinstance(k, int):
            return self.function(scores, k, temperature, **options).sum(-2)
        rows = self.function(scores, largest(k, scores.shape[-1]), temperature, **options)
        taken = torch.arange(rows.shape[-2], device=k.device) < k.unsqueeze(-1)
        return (rows * taken.unsqueeze(-1).to(rows.dtype)).sum(-2)

    def _selection(self, scores: Tensor, k: int, temperature: Temperature, options: Any) -> Tensor:
        if self.has_rows:
            return self.function(scores, k, temperature, **options)
        masks = self._nested(scores, k, temperature, options)
        return torch.diff(masks, dim=-2, prepend=torch.zeros_like(masks[..., :1, :]))

    def _values(self, scores: Tensor, k: int, temperature: Temperature, options: Any) -> Tensor:
        column = scores.unsqueeze(-1)
        if self.has_rows:
            return (self.function(scores, k, temperature, **options) @ column).squeeze(-1)
        sums = (self._nested(scores, k, temperature, options) @ column).squeeze(-1)
        return torch.diff(sums, dim=-1, prepend=torch.zeros_like(sums[..., :1]))

    def _nested(self, scores: Tensor, k: int, temperature: Temperature, options: Any) -> Tensor:
        """Masks for 1, ..., k side by side: (..., k, n)."""
        if isinstance(temperature, Tensor) and temperature.dim() > 1:
            temperature = temperature.unsqueeze(-2)
        check_size(k * scores.numel(), scores, "a selection")
        counts = torch.arange(1, k + 1, device=scores.device)
        return self.function(scores.unsqueeze(-2), counts, temperature, **options)


def operator(
    *,
    has_rows: bool = False,
    streamed: Callable[..., Tensor] | None = None,
    family: str = "",
    cost: str = "",
    source: str = "",
    checked: str = "",
    **guarantees: bool,
) -> Callable[[Callable[..., Tensor]], Operator]:
    """Declare a function an operator: what it guarantees (`Guarantees`) and what it is (`About`)."""
    about = About(family, cost, source, checked)
    return lambda function: Operator(function, Guarantees(**guarantees), has_rows, streamed, about)


def bound(part: "Operator | functools.partial[Tensor]") -> tuple[Operator, dict[str, Any]]:
    """The operator and its options, from an operator or a `functools.partial` of one (YAML's `_partial_`).

    Raises:
        TypeError: neither of them.
    """
    whole, options = (part.func, part.keywords) if isinstance(part, functools.partial) else (part, {})
    if not isinstance(whole, Operator):
        raise TypeError(f"operator must be one of topkbench.operators, got {whole!r}")
    return whole, dict(options)


def check(scores: Tensor, k: int | Tensor, temperature: Temperature = 1.0) -> None:
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
    if isinstance(k, Tensor):
        _check_counts(k, scores)
    elif not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {k!r}")
    elif not 1 <= k <= n:
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


def _check_one(k: int) -> None:
    if isinstance(k, Tensor):
        raise TypeError(f"a selection has k rows: k must be an int, got a tensor of shape {tuple(k.shape)}")


def _check_counts(k: Tensor, scores: Tensor) -> None:
    if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
        raise TypeError(f"k must be an int or a tensor of whole numbers, got {k.dtype}")
    if not _broadcasts(k.shape, scores.shape[:-1]):
        raise ValueError(
            f"k must broadcast over rows: (...) against scores of shape {tuple(scores.shape)}, "
            f"got shape {tuple(k.shape)}"
        )
    if readable(k):
        check_range(k, scores.shape[-1])


def check_range(k: Tensor, n: int) -> None:
    """Look at every k, and refuse one outside [1, n] with a ValueError."""
    if k.numel() and not 1 <= k.min() <= k.max() <= n:
        raise ValueError(f"k must be in [1, {n}] for {n} scores, got {int(k.min())} to {int(k.max())}")


def readable(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at without making an accelerator or a transformation wait."""
    return tensor.device.type == "cpu" and not transformed(tensor)


def largest(k: int | Tensor, n: int) -> int:
    """The largest k of any row, or n where it may not be looked at."""
    if isinstance(k, int):
        return k
    return int(k.max()) if readable(k) and k.numel() else n


def transformed(tensor: Tensor) -> bool:
    """Whether a compiler traces, or a transformation of torch.func is under way on this tensor."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_size(numbers: int, like: Tensor, what: str) -> None:
    """Refuse a tensor that would not fit.

    Raises:
        ValueError: `numbers` of the dtype of `like` take more than LIMIT bytes.
    """
    size = numbers * like.element_size()
    if size > LIMIT:
        raise ValueError(
            f"{what} of scores {tuple(like.shape)} takes {size / 2**30:.1f} GiB, "
            f"and the limit is {LIMIT / 2**30:.0f} GiB"
        )


def _broadcasts(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    if len(shape) > len(onto):
        return False
    return all(size in (1, target) for size, target in zip(shape[::-1], onto[::-1], strict=False))


def prepared(scores: Tensor, k: int | Tensor, temperature: Temperature) -> Temperature:
    """The temperature, checked, in the precision of the scores: it must not decide that of the mask."""
    check(scores, k, temperature)
    return temperature.to(scores.dtype) if isinstance(temperature, Tensor) else temperature
