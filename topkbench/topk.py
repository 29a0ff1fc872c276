"""Differentiable top-k in one call, without the harness: `topk_mask(scores, k, "entropic")`."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from topkbench import operators
from topkbench.nearest import unknown
from topkbench.operators import Operator, hard_mask, perturbed_mask
from topkbench.operators._contract import Temperature, check_range
from topkbench.operators.hard import straight_through

STRAIGHT_THROUGH = "ste_"
PLAIN = {"hard": hard_mask, "perturbed": perturbed_mask}


def methods() -> list[str]:
    """What `topk_mask` takes as its method, without the `ste_` forms."""
    named = (name for name, thing in vars(operators).items() if isinstance(thing, Operator))
    return sorted({*PLAIN, *named})


def topk_mask(
    scores: Float[Tensor, "*rows n"],
    k: int | Tensor,
    method: str = "entropic",
    temperature: Temperature = 1.0,
    *,
    check: bool = False,
    **options: Any,
) -> Float[Tensor, "*rows n"]:
    """A mask of the k largest scores, hard or relaxed, with the gradient of the method.

        topk_mask(scores, 8)                                  # entropic: smooth, in (0, 1), sum 8
        topk_mask(scores, 8, "ste_sparsemax", 0.3)            # k ones; the gradient of sparsemax
        topk_mask(scores, k, "entmax", temperature, alpha=1.2)

    Args:
        scores: `(..., n)`, floating point. Half precision is computed in float32.
        k: In [1, n]; a tensor that broadcasts with the leading dimensions gives each row its own.
        method: An operator of `topkbench.operators`, "hard", "perturbed" (k a number), or "ste_" and an
            operator: the hard mask with that operator's gradient. "ste" is the plain straight-through one.
        temperature: > 0, the smoothing strength; a tensor broadcasts `(..., 1)`. "hard" has none.
        check: Look at all numbers and refuse NaN, a temperature that is not > 0 and a k out of range also
            where they are in tensors on an accelerator, which waits for it. Without it NaN gives NaN.
        **options: What else the operator takes.

    Returns:
        The mask, of the shape of the scores.

    Raises:
        ValueError: a method that is not there, or k, temperature or (with `check`) scores out of range.
        TypeError: scores that are not floating point, or an option that the operator does not have.
    """
    if check:
        _check_values(scores, k, temperature)
    if method == "hard":
        return hard_mask(scores, k, **options)
    if method == "ste":
        method = STRAIGHT_THROUGH + "identity"
    if method.startswith(STRAIGHT_THROUGH):
        name = method.removeprefix(STRAIGHT_THROUGH)
        if name in PLAIN:
            raise ValueError(f"{method!r}: {name} is no relaxation; ste_ stands before an operator")
        return straight_through(hard_mask(scores, k), _named(name, method)(scores, k, temperature, **options))
    return _named(method, method)(scores, k, temperature, **options)


def _named(name: str, given: str) -> Any:
    found = PLAIN.get(name) or getattr(operators, name, None)
    if not (name in PLAIN or isinstance(found, Operator)):
        raise ValueError(unknown(given, [*methods(), "ste"], "method") + "; each also as ste_NAME")
    return found


def _check_values(scores: Tensor, k: int | Tensor, temperature: Temperature) -> None:
    wrong = scores.isnan()
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"scores hold {int(wrong.sum())} NaN, the first at index {first}")
    if isinstance(k, Tensor):
        check_range(k, scores.shape[-1])
    if isinstance(temperature, Tensor) and not (temperature > 0).all():
        raise ValueError(f"temperature must be > 0, got {temperature.min().item()} among its values")


__all__ = ["methods", "topk_mask"]
