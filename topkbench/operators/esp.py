"""Elementary symmetric polynomials as probabilities: the law of a sum of independent Bernoulli variables.

`prod_i (q_i + p_i x)` is multiplied out by a tree that halves the number of factors at each of its log2 n
levels; `x^j` has the probability that j of the variables are 1 as its coefficient. All numbers are sums of
products of numbers in [0, 1], so nothing cancels, and where the p_i sum to about k those around `x^k` are
not small: no logarithms are needed. What the other factors make of each one comes down the same tree,
by correlation: the derivative of the root.

Every tensor has in front an axis of length 1, or of length 2 for values and derivatives in one direction:
products are bilinear, and the same code then carries `a + da` with `da^2 = 0`.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

SMALL = 16  # up to here matmul is the faster of two ways to the same sums


def up(factors: Float[Tensor, "j *rows n c"], degree: int) -> list[Tensor]:
    """Products of pairs, of pairs of pairs, ...: the levels of the tree, the factors first, the root last.

    Args:
        factors: `(j, ..., n, 1 or 2)`: the coefficients of 1 and x; one only where degree is 0.
        degree: Higher powers of x are dropped.

    Returns:
        Polynomials `(j, ..., m, size)` for m = n, ceil(n/2), ..., 1, each level but the root filled up with
        the polynomial 1 to an even m.
    """
    levels = [factors]
    while levels[-1].shape[-2] > 1:
        even = levels[-1] = _even(levels[-1])
        size = min(2 * even.shape[-1] - 1, degree + 1)
        left, right = even[..., 0::2, :], even[..., 1::2, :]
        levels.append(_bilinear(partial(_multiply, size=size), left, right))
    return levels


def down(levels: list[Tensor], root: Float[Tensor, "j *rows 1 size"]) -> Float[Tensor, "j *rows n c"]:
    """The derivative of `<root, product of all factors>` with respect to each factor.

    With root = 1 at `x^k`, entry c of factor i is the probability that the others sum to k - c.

    Args:
        levels: What `up` made.
        root: `(j, ..., 1, size)`.
    """
    adjoint = root
    for level in reversed(levels[:-1]):
        adjoint = adjoint[..., : (level.shape[-2] + 1) // 2, :]  # not what a level was filled up with
        left, right = level[..., 0::2, :], level[..., 1::2, :]
        parts = [_bilinear(_correlate, adjoint, other) for other in (right, left)]
        adjoint = torch.stack(parts, -2).flatten(-3, -2)
    return adjoint


def _even(level: Tensor) -> Tensor:
    if level.shape[-2] % 2 == 0:
        return level
    one = torch.zeros_like(level[..., :1, :])
    one[:1, ..., 0] = 1  # its derivative is 0
    return torch.cat([level, one], -2)


def _bilinear(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """`a b` or, of values and derivatives, `(a b, da b + a db)`."""
    both = product(a, b[:1])
    if len(a) == 1:
        return both
    return torch.cat([both[:1], both[1:] + product(a[:1], b[1:])])


def _multiply(a: Tensor, b: Tensor, size: int) -> Tensor:
    """The first `size` coefficients of the product of two polynomials with equally many."""
    c = a.shape[-1]
    # out_i = sum_j b_(i-j) a_j
    return _sums(pad(b, (c - 1, size - c)).unfold(-1, c, 1), a.flip(-1))


def _correlate(adjoint: Tensor, other: Tensor) -> Tensor:
    """What reaches one factor of a product when `adjoint` reaches the product."""
    c = other.shape[-1]
    # out_j = sum_i adjoint_(i+j) other_i
    return _sums(pad(adjoint, (0, 2 * c - 1 - adjoint.shape[-1])).unfold(-1, c, 1), other)


def _sums(windows: Tensor, weights: Tensor) -> Tensor:
    if weights.shape[-1] <= SMALL:
        return (windows @ weights.unsqueeze(-1)).squeeze(-1)
    return (windows * weights.unsqueeze(-2)).sum(-1)
