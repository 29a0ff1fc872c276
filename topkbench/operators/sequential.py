"""Draws of whole subsets without replacement: stochastic beam search over the k items of a subset.

An outcome is a path of k items with probability p = the product of its branches' conditional probabilities.
Let each outcome arrive at T ~ Exp(p); the M first ones are M draws without replacement. They are found
without a list of all outcomes: a beginning of paths, of total probability w, arrives with the first of them,
at T ~ Exp(w), and given T its continuations i, of probabilities w_i, arrive at

    T_i = T + E_i / w_i - min_j E_j / w_j,      E independent standard exponentials,

since exponentials have no memory. Only beginnings among the M first so far can end among the M first. With
-log T for T these are the Gumbel perturbed log-probabilities of the source.

Source: Kool, van Hoof & Welling 2019, "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for
Sampling Sequences Without Replacement". Differs: times of arrival in place of Gumbel variables.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.operators._contract import Temperature, check_size, prepared
from topkbench.operators._top import top_values

Waits = Callable[[int, int], Tensor]
Grow = Callable[[Tensor], Tensor]
SURE = 300.0  # log-odds further from the k-th than this are as good as infinite: exp(-300) is 1e-130
RARE = -30.0  # log x from where on 1 - exp(-x) is x, in float64


class Distinct(NamedTuple):
    """Distinct outcomes of each row, and how to weigh them.

    Attributes:
        picks: `(M, ..., k)`: which items, in the order of the path.
        p: `(M, ...)`, the probability of each outcome.
        weight: `(M, ...)`, p over the probability of arriving before the (M+1)-th outcome did: the mean of
            `sum_m weight_m f_m` is the mean of f. Where there are fewer than M outcomes, or what is left has
            no chance, it is 0, and picks are those of the first one.
    """

    picks: Int[Tensor, "M ... k"]
    p: Float[Tensor, "M ..."]
    weight: Float[Tensor, "M ..."]


def distinct_subsets(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature, samples: int, waits: Waits
) -> Distinct:
    """Distinct k-subsets of the law of `topkbench.operators.subset`, without replacement.

    A subset is the path of its items in the order of their places: after item j with r left to take,

        p(i next) = w_i e_(r-1)(w after i) / e_r(w after j),     i > j,    w = exp(s / temperature),

    e_r the elementary symmetric polynomial.

    Args:
        scores: `(..., n)`.
        k: How many items, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        samples: M >= 1, how many outcomes.
        waits: `waits(item, beams)`: standard exponentials `(..., beams, n)` for the branches to an item of
            the path, item = 0..k-1.

    Returns:
        Constants for autograd. With at least as many samples as subsets, p and weight are the same.

    Raises:
        ValueError: k or temperature out of range; more than the limit in one tensor.

    Cost: time k M n, memory (k + M) n, in k batched steps one after the other: an item has a law only
    once those before it are known. In float64 whatever the scores.
    """
    temperature = prepared(scores, k, temperature)
    with torch.no_grad():
        check_size(2 * k * scores.numel(), scores, "the k-subset distribution")
        table = _suffixes(_near(scores, k, temperature), k)
        places = torch.arange(scores.shape[-1], device=scores.device)

        def grow(index: Tensor) -> Tensor:
            ahead = table[k - 1 - index.shape[-1]].unsqueeze(-2)
            return torch.where(places > index[..., -1:], ahead, -torch.inf) if index.shape[-1] else ahead

        return _distinct(scores, k, samples, grow, waits)


def distinct_orders(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature, samples: int, waits: Waits
) -> Distinct:
    """Distinct draws of k in order, of the law of `topkbench.operators.plackett_luce`, without replacement.

    The same k in another order are another outcome. Arguments, errors and cost are those of
    `distinct_subsets`.
    """
    temperature = prepared(scores, k, temperature)
    with torch.no_grad():
        bound = torch.finfo(scores.dtype).max ** 0.5
        logits = (scores.clamp(-bound, bound).double() / temperature).unsqueeze(-2)

        def grow(index: Tensor) -> Tensor:
            return logits.expand(*index.shape[:-1], scores.shape[-1]).scatter(-1, index, -torch.inf)

        return _distinct(scores, k, samples, grow, waits)


def _near(scores: Tensor, k: int, temperature: Temperature) -> Tensor:
    """The log-odds less the k-th largest, none of them beyond SURE: sums of them must stay precise."""
    bound = torch.finfo(scores.dtype).max ** 0.5
    scores = scores.clamp(-bound, bound).double()
    return ((scores - top_values(scores, k)[..., -1:]) / temperature).clamp(-SURE, SURE)


def _suffixes(u: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "k *rows n"]:
    """`log(w_i e_(r-1)(w after i))` at r - 1 and i.

    By `e_r(w from j on) = sum_(i >= j) w_i e_(r-1)(w after i)`: a cumulative sum from the end for each r.
    """
    rows = [u]
    for _ in range(k - 1):
        from_here = rows[-1].flip(-1).logcumsumexp(-1).flip(-1)
        after = torch.cat([from_here[..., 1:], torch.full_like(u[..., :1], -torch.inf)], -1)
        rows.append(u + after)
    return torch.stack(rows)


def _distinct(scores: Tensor, k: int, samples: int, grow: Grow, waits: Waits) -> Distinct:
    """The first `samples` outcomes of each row, weighed by when the next one arrived."""
    index, log_p, late = _beams(scores, k, samples + 1, grow, waits)
    kappa = late[..., samples:]
    if not kappa.shape[-1]:  # there is no next outcome: everything arrives in time
        kappa = torch.full_like(late[..., :1], torch.inf)
    index, log_p = index[..., :samples, :], log_p[..., :samples]
    log_x = log_p + kappa
    log_q = torch.where(log_x < RARE, log_x, (-(-log_x.exp()).expm1()).log())
    weight = torch.where(log_p == -torch.inf, 0, (log_p - log_q).exp()).to(scores.dtype)
    index = torch.where((weight == 0).unsqueeze(-1), index[..., :1, :], index)
    return Distinct(index.movedim(-2, 0), log_p.exp().to(scores.dtype).movedim(-1, 0), weight.movedim(-1, 0))


def _beams(
    scores: Tensor, k: int, width: int, grow: Grow, waits: Waits
) -> tuple[Int[Tensor, "*rows b k"], Float[Tensor, "*rows b"], Float[Tensor, "*rows b"]]:
    """Paths, log-probabilities and logarithms of times of arrival of the `width` first, in this order.

    What `grow` says of beginnings `(..., b, items)` are the logits of the next item `(..., b, n)`.
    """
    n = scores.shape[-1]
    check_size(2 * width * scores.numel(), scores, "the branches of a beam search")
    index = torch.zeros((*scores.shape[:-1], 1, 0), dtype=torch.long, device=scores.device)
    log_p = torch.zeros((*scores.shape[:-1], 1), dtype=torch.float64, device=scores.device)
    late = None
    for item in range(k):
        dead = (log_p == -torch.inf).unsqueeze(-1)
        log_p = torch.where(dead, -torch.inf, log_p.unsqueeze(-1) + grow(index).log_softmax(-1))
        late = _arrivals(late, log_p, waits(item, log_p.shape[-2]).double()).flatten(-2)
        late, best = late.topk(min(width, late.shape[-1]), dim=-1, largest=False)
        log_p = log_p.flatten(-2).gather(-1, best)
        begun = (best // n).unsqueeze(-1).expand(*best.shape, item)
        index = torch.cat([index.gather(-2, begun), (best % n).unsqueeze(-1)], -1)
    assert late is not None  # k >= 1
    return index, log_p, late


def _arrivals(
    late: Float[Tensor, "*rows b"] | None,
    log_p: Float[Tensor, "*rows b n"],
    waits: Float[Tensor, "*rows b n"],
) -> Float[Tensor, "*rows b n"]:
    """When each branch arrives, the first of a beginning when the beginning does; in logarithms."""
    alone = waits.log() - log_p
    first = alone.amin(-1, keepdim=True)
    first = torch.where(first == torch.inf, 0, first)  # a beginning without a chance: inf - inf
    behind = alone + (-(first - alone).expm1()).log()
    return torch.logaddexp(first if late is None else late.unsqueeze(-1), behind)
