"""The threshold family: m_i = F(u_i - t) with u = scores / temperature and t such that sum_i m_i = k.

F is a distribution function. Implicit differentiation of `sum F = k` gives one vector-Jacobian product for
the whole family,

    g  ->  h = a * (g - <a, g> / <a, 1>) / temperature,     a = F'(F^-1(m)),  a function of the mask alone,

and `-<h, scores> / temperature` for the temperature. So the backward pass needs nothing but the output, and
is itself differentiable.

Where t lies. Shift the scores so that u_(k) = h and u_(k+1) = -h. Whatever F is,

    -h - Q(k / (k+1))  <=  t  <=  h - Q(1 / (n-k+1)),     Q = F^-1:

at the upper end the k-th score alone is short of 1 by (n-k) / (n-k+1), and each of the n-k scores below
is over 0 by at most 1 / (n-k+1); at the lower end likewise. A kernel may know better (`kernels.py`).
Safeguarded Newton steps within the bracket solve `C(mean F(u - t)) = C(k / n)` rather than
`sum F(u - t) = k`, with an increasing C, such as the logit: the same root, but in t nearly a straight line
when the scores lie close together, where the other form crawls.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from topkbench.operators._contract import Temperature, largest, readable
from topkbench.operators._loop import State, Step, as_one_loop, settle
from topkbench.operators._top import at_rank, top_values
from topkbench.operators._vmap import in_front

FEW = 16  # scores: plain Newton steps are as good there
PIECE = 1 << 16  # numbers that are worked on at once
FREE = 4  # steps without bisection: nearly all rows need no more; compiled as one loop, none
STEPS = 64  # with it, at most


@runtime_checkable
class Kernel(Protocol):
    """A distribution function F."""

    steps: ClassVar[int]
    """How many steps in all where nobody may look whether it is done: on an accelerator, under vmap."""
    smooth: ClassVar[bool]
    """Whether a Newton step from nearby squares the error; else it is exact on one linear piece."""

    @property
    def straight(self) -> bool:
        """Whether F is straight where it rises: then a step in C is one in the sum itself."""

    def cdf_(self, v: Tensor) -> Tensor:
        """F(v), in the memory of v."""

    def density(self, mask: Tensor) -> Tensor:
        """F'(F^-1(mask)), differentiable."""

    def moments_(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Sum F(v) and sum F'(v) of each row, `(..., 1)`; v is overwritten."""

    def curve(self, p: Tensor) -> Tensor:
        """An increasing C for which C(mean F(u - t)) is nearly a straight line in t."""

    def rate(self, p: Tensor) -> Tensor:
        """1 / C'(p)."""

    def bracket(self, k: Tensor, n: int, half: Tensor) -> tuple[Tensor, Tensor]:
        """Where t lies, half the gap between the k-th and the (k+1)-th score being `half`."""

    def start(self, low: Tensor, high: Tensor) -> Tensor:
        """The first t to try."""


def centred(scores: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """The scores less the point halfway between the k-th and the (k+1)-th, and half the gap of the two.

    Where k = n the k-th stands for both. The two come out as the same number with opposite signs, to the
    last bit, however large the scores. A row whose k-th score is infinite keeps its order. The point in the
    middle is held constant.
    """
    n = scores.shape[-1]
    ranked = top_values(scores.detach(), min(largest(k, n) + 1, n))
    return about_middle(scores, at_rank(ranked, k), at_rank(ranked, next_rank(k, n)))


def next_rank(k: int | Tensor, n: int) -> int | Tensor:
    """The rank after the k-th, or n where there is none."""
    return min(k + 1, n) if isinstance(k, int) else (k + 1).clamp(max=n)


def about_middle(scores: Tensor, kth: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """What `centred` gives, from the k-th and the next score, `(..., 1)` each."""
    bound = torch.finfo(scores.dtype).max ** 0.5  # over a low temperature it is still finite
    kth, following = kth.clamp(-bound, bound), following.clamp(-bound, bound)
    half = (kth - following) / 2
    return (scores - kth).add_(half), half


def _ones(scores: Tensor) -> Tensor:
    """The mask where k = n: everything is taken, and NaN stays."""
    return torch.ones_like(scores).masked_fill(scores.isnan(), torch.nan)


def _solve(u: Tensor, k: int | Tensor, half: Tensor, kernel: Kernel) -> Tensor:
    """The threshold t of each row, (..., 1), for centred u."""
    n, look, one_loop = u.shape[-1], readable(u), as_one_loop(u)
    curved = n > FEW and not kernel.straight
    count = torch.as_tensor(k if isinstance(k, int) else k.unsqueeze(-1), dtype=u.dtype, device=u.device)
    low, high = kernel.bracket(count, n, half)
    eps = torch.finfo(u.dtype).eps
    near = eps**0.5 if kernel.smooth else 16 * eps
    # A number is faster, but the steps of one loop may look at none that changes from call to call.
    target = float(k) if isinstance(k, int) and not one_loop else count
    goal = kernel.curve(count / n) if curved else None

    def newton(t: Tensor) -> State:
        total, slope = _moments(u, t, kernel)
        # A total that is right to rounding stays: the slope of a hard mask is rounding too.
        excess = _beyond(total - target, 2 * eps * target)
        proposed = t + _newton(total, slope, excess, goal, n, kernel)
        length = (proposed - t).abs_()
        return excess, proposed, length, length <= (near * (1 + t.abs()) if curved else near)

    def guarded(t: Tensor, moved: Tensor, low: Tensor, high: Tensor) -> Step:
        excess, proposed, length, settled = newton(t)
        low = torch.where(excess >= 0, t, low)
        high = torch.where(excess <= 0, t, high)
        good = (proposed >= low) & (proposed <= high) & (settled | (length <= moved / 2))
        proposed = torch.where(good, proposed, (low + high) / 2)
        return settled, (proposed, (proposed - t).abs_(), low, high)

    t, moved = kernel.start(low, high), torch.full_like(half, torch.inf)
    for step in range(0 if one_loop else FREE):
        _, proposed, _, settled = newton(t)
        proposed = torch.fmax(torch.fmin(proposed, high), low)
        moved, t = (proposed - t).abs_(), proposed
        if look and step > 0 and settled.all():
            return t
    state = tuple(part.expand_as(half) for part in (t, moved, low, high))
    return settle(guarded, state, STEPS if look or one_loop else kernel.steps - FREE, look=look)[0]


def _beyond(excess: Tensor, rounding: float | Tensor) -> Tensor:
    """The excess, or 0 where it is no more than rounding."""
    if isinstance(rounding, Tensor):
        return torch.where(excess.abs() <= rounding, 0, excess)
    return torch.nn.functional.hardshrink(excess, rounding)


def _moments(u: Tensor, t: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Sum F(u - t) and sum F'(u - t) of each row, `(..., 1)`."""
    if not _in_pieces(u):
        return kernel.moments_(u - t)
    n, shape = u.shape[-1], u.shape[:-1]
    totals, slopes = [], []
    for u_rows, t_rows in _pieces(u.reshape(-1, n), t.expand(*shape, 1).reshape(-1, 1)):
        sums = [kernel.moments_(piece - t_rows) for piece in u_rows.split(PIECE, -1)]
        total, slope = (sum(part[1:], part[0]) for part in zip(*sums, strict=True))
        totals.append(total)
        slopes.append(slope)
    return torch.cat(totals).view(*shape, 1), torch.cat(slopes).view(*shape, 1)


def _in_pieces(numbers: Tensor) -> bool:
    """Whether a tensor is so large that work on pieces of it pays: they stay in the cache of one core."""
    return numbers.numel() > PIECE and readable(numbers)


def _pieces(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows at a time as make a piece, at least one."""
    rows = max(1, PIECE // max(part.shape[-1] for part in parts))
    return zip(*(part.split(rows) for part in parts), strict=True)


def _newton(
    total: Tensor, slope: Tensor, excess: Tensor, goal: Tensor | None, n: int, kernel: Kernel
) -> Tensor:
    slope = slope.clamp_min(torch.finfo(slope.dtype).tiny)
    if goal is None:
        return excess / slope
    mean = total / n
    rate = kernel.rate(mean)
    # Where all entries are 0 or 1 C has no slope, and the plain step is one to the end of the bracket.
    step = torch.where(rate > 0, (kernel.curve(mean) - goal) * (rate * n / slope), excess / slope)
    return torch.where(excess == 0, 0, step)


class _Threshold(torch.autograd.Function):
    """(scores, temperature) -> F(u - t), with the family's vector-Jacobian product."""

    @staticmethod
    def forward(scores: Tensor, temperature: Temperature, k: int | Tensor, kernel: Kernel) -> Tensor:
        n = scores.shape[-1]
        if isinstance(k, int) and k == n:
            return _ones(scores)
        # There is no (n+1)-th score: rows with k = n are overwritten.
        own, k = k, k.clamp(max=max(n - 1, 1)) if isinstance(k, Tensor) else k
        u, half = centred(scores, k)
        if not (isinstance(temperature, float | int) and temperature == 1):
            u, half = u.div_(temperature), half / temperature
        mask = kernel.cdf_(u.sub_(_solve(u, k, half, kernel)))
        return torch.where((own == n).unsqueeze(-1), _ones(scores), mask) if isinstance(own, Tensor) else mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores, temperature, _, ctx.kernel = inputs
        ctx.shape = scores.shape
        ctx.number = None if isinstance(temperature, Tensor) else temperature
        # The scores are needed for the derivative in the temperature alone.
        heated = isinstance(temperature, Tensor) and ctx.needs_input_grad[1]
        hot = [temperature] if isinstance(temperature, Tensor) else []
        ctx.save_for_backward(output, *hot, *([scores] if heated else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        mask, *others = ctx.saved_tensors
        temperature = others[0] if others else ctx.number
        h = _vjp(mask, grad, ctx.kernel)
        if ctx.number != 1:
            h = h / temperature if torch.is_grad_enabled() else h.div_(temperature)
        hot = None
        if len(others) == 2:
            scores = others[1]
            # h sums to 0, so a shift changes nothing but the rounding; infinite scores have h = 0.
            bound = torch.finfo(scores.dtype).max ** 0.5
            finite = scores.clamp(-bound, bound)
            finite = finite - finite.amax(-1, keepdim=True)
            hot = -((h * finite) / temperature).sum_to_size(temperature.shape)
        return h.sum_to_size(ctx.shape), hot, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], scores: Tensor, temperature: Any, k: Any, kernel: Kernel
    ) -> tuple[Tensor, int]:
        moved = in_front(info.batch_size, (scores, temperature, k), in_dims[:3], (1, 1, 0))
        return _Threshold.apply(*moved, kernel), 0


def _vjp(mask: Tensor, grad: Tensor, kernel: Kernel) -> Tensor:
    if torch.is_grad_enabled() or not _in_pieces(mask):
        a = kernel.density(mask)
        return a * (grad - _mean(torch.linalg.vecdot(a, grad).unsqueeze(-1), a.sum(-1, keepdim=True)))
    n, out = mask.shape[-1], torch.empty_like(mask, memory_format=torch.contiguous_format)
    flat = (mask.reshape(-1, n), grad.expand_as(mask).reshape(-1, n), out.view(-1, n))
    for m, g, o in _pieces(*flat):
        _vjp_of_rows(m, g, o, kernel)
    return out


def _vjp_of_rows(mask: Tensor, grad: Tensor, out: Tensor, kernel: Kernel) -> None:
    """Into `out`, in pieces of the last dimension: what is between stays in the cache, and little of it."""
    pieces = list(zip(*(part.split(PIECE, -1) for part in (mask, grad, out)), strict=True))
    whole = kernel.density(mask) if len(pieces) == 1 else None
    product, total = torch.zeros_like(mask[:, :1]), torch.zeros_like(mask[:, :1])
    for m, g, _ in pieces:
        a = kernel.density(m) if whole is None else whole
        product += torch.linalg.vecdot(a, g).unsqueeze(-1)
        total += a.sum(-1, keepdim=True)
    mean = _mean(product, total)
    for m, g, o in pieces:
        torch.sub(g, mean, out=o).mul_(kernel.density(m) if whole is None else whole)


def _mean(product: Tensor, total: Tensor) -> Tensor:
    # A mask that is hard to the last bit has a = 0: its gradient is 0, not 0/0.
    return product / (total + (total == 0).to(total.dtype))


def threshold(scores: Tensor, k: int | Tensor, temperature: Temperature, kernel: Kernel) -> Tensor:
    """The mask `F(scores / temperature - t)` that sums to k.

    Args:
        scores: `(..., n)`.
        k: In [1, n]; a tensor broadcasts with the leading dimensions, which may be those of k.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        kernel: F.

    Returns:
        `(..., n)`.
    """
    return _Threshold.apply(scores, temperature, k, kernel)
