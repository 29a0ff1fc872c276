"""The unordered-set estimator: distinct outcomes, weighed by how likely the set is that they make."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.methods._contract import Step, one_of, positive
from topkbench.methods._distinct import drawn, log_probability, losses_of
from topkbench.methods.score_function import Law
from topkbench.operators import About
from topkbench.operators._contract import Temperature, check_size
from topkbench.operators.sequential import SURE

MOST = 12  # draws: the time goes with 2^M


@dataclass(frozen=True)
class UnorderedSet:
    """M distinct outcomes S, drawn without replacement; the order of the draws averaged out. Unbiased.

        sum_(m in S) p_m R(S, m) ((L_m - V_m) d log p_m / ds + dL_m / ds),
        V_m = p_m L_m + sum_(j in S, j != m) p_j R(S - m, j) L_j,
        R(A, m) = P(A - m) / P(A)

    P(A): the chance that the next |A| draws are those of A, in any order, those of S that are not in A being
    gone. The weights `p_m R(S, m)` sum to 1 and so do those of V_m, for every S: a constant added to the loss
    changes nothing. The value is `sum_m p_m R(S, m) L_m`, unbiased for E L. With M at least the number of
    outcomes all R are 1, and the gradient is exact. It is the mean of
    `ScoreFunctionWithoutReplacement` given S, its baseline aside.

    Where values are wanted, they are the drawn scores, the largest first.

    Attributes:
        law: Of the subset, with log-odds or logits scores / temperature. "conditional_poisson": the outcomes
            are k-subsets. "plackett_luce": draws of k in order; the same k in another order are another.
        samples: M in [2, 12], how many outcomes are drawn for each row.
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own.

    Raises:
        ValueError: an unknown law, samples out of range, temperature <= 0, infinite or NaN.

    Cost: k batched steps one after the other, each M n for a row (see `operators.sequential`), M 2^M, and M
        losses.

    Source: Kool, van Hoof & Welling 2020, "Estimating Gradients for Discrete Random Variables by Sampling
    without Replacement", the policy gradient with built-in baseline; the draws of whole subsets, Kool et al.
    2019. Differs: P by a recursion over subsets of S, in which nothing is subtracted, where the source sums
    over orders or integrates numerically. At k = 1 the outcomes are the n categories, as there; for k > 1
    they are k-subsets.
    """

    about: ClassVar[About] = About(
        "score function", "k steps of M n, M 2^M, and M losses", "Kool et al. 2020", "enumeration of draws"
    )
    law: Law = "conditional_poisson"
    samples: int = 4
    temperature: Temperature = 1.0
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("law", self.law, get_args(Law))
        if not 2 <= self.samples <= MOST:
            raise ValueError(f"samples must be in [2, {MOST}], got {self.samples}")
        positive(temperature=self.temperature)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The weighed loss of the outcomes."""
        picks, _, weight = drawn(step, self.law, self.temperature, self.samples)
        losses, masks = losses_of(step, picks)
        log_p = log_probability(step, self.law, self.temperature, picks, masks)
        n, k = step.scores.shape[-1], step.k
        count = math.comb(n, k) if self.law == "conditional_poisson" else math.perm(n, k)
        first, second = weights(log_p.detach().double(), weight == 0, exact=self.samples >= count)
        first, second = first.to(losses.dtype), second.to(losses.dtype)
        loss = (first * losses).sum(0)
        if not torch.is_grad_enabled():
            return loss
        given = losses.detach()
        term = (first * (given - (second * given).sum(1)) * log_p).sum(0)
        return loss + (term - term.detach())


class _Sets(NamedTuple):
    """The subsets of one size of M draws, as numbers: bit m is draw m."""

    which: Int[Tensor, " sets"]
    members: Int[Tensor, "sets size"]
    without: Int[Tensor, "sets size"]


@functools.cache
def _sets(count: int, device: torch.device) -> list[_Sets]:
    """Those of size 1, ..., M; `without` is, beside each member, the subset that lacks it."""
    sizes = []
    for size in range(1, count + 1):
        members = torch.tensor(list(itertools.combinations(range(count), size)), device=device)
        bits = 1 << members
        which = bits.sum(-1)
        sizes.append(_Sets(which, members, which.unsqueeze(-1) - bits))
    return sizes


def weights(
    log_p: Float[Tensor, "M ..."], gone: Tensor, *, exact: bool
) -> tuple[Float[Tensor, "M ..."], Float[Tensor, "M M ..."]]:
    """`p_m R(S, m)` for each outcome of a set, and at m, j the weight of L_j in V_m (see `UnorderedSet`).

    Args:
        log_p: Log-probabilities of the outcomes, in float64.
        gone: Which outcomes are none: weight 0. A row that has such is taken to have all outcomes there are.
        exact: Whether there are no outcomes but these.
    """
    size = len(log_p)
    log_p = torch.where(gone, -torch.inf, log_p)
    p = log_p.exp()
    same = torch.eye(size, dtype=torch.bool, device=p.device).reshape(size, size, *[1] * (p.dim() - 1))
    if exact:
        return p, p.expand(size, *p.shape)
    largest = max(s * math.comb(size, s) for s in range(1, size + 1))
    check_size(largest * p[0].numel(), p, "subsets of the draws")
    log_p = torch.maximum(log_p, log_p.amax(0) - SURE)  # products of them must stay precise
    chance = _chances(log_p)
    bits = 1 << torch.arange(size, device=p.device)
    whole = (1 << size) - 1
    left = whole - bits
    first = (log_p + chance[left] - chance[whole]).exp()
    second = (log_p + chance[left.unsqueeze(1) & left] - chance[left].unsqueeze(1)).exp()
    second = torch.where(same, p, second)
    complete = gone.any(0)
    return torch.where(complete, p, first), torch.where(complete, p, second)


def _chances(log_p: Float[Tensor, "M ..."]) -> Float[Tensor, "subsets ..."]:
    """`log P(A)` for every A within S: of the draws with what is in S but not in A gone.

    P(A) = sum_(m in A) p_m P(A - m) / (p(A) + rest),    rest = 1 - p(S)
    """
    total = log_p.logsumexp(0)
    rest = (-total.clamp(max=0).expm1()).log()  # to rounding: weights as small as that are not precise
    chance = log_p.new_zeros(1 << len(log_p), *log_p.shape[1:])
    for which, members, without in _sets(len(log_p), log_p.device):
        arrived = (log_p[members] + chance[without]).logsumexp(1)
        chance[which] = arrived - torch.logaddexp(log_p[members].logsumexp(1), rest)
    return chance
