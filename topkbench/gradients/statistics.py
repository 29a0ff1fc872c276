"""A method's gradient at a fixed W: its bias, its variance by source, and what a step along it is worth.

M fresh mini-batches per replicate are so many more replicates of the same W. They are streamed: a chunk at a
time goes through the method, and only means and sums of squares are kept, in BLOCKS blocks merged as Chan,
Golub & LeVeque (1983) do; so memory does not grow with M.

With g_m the gradient on mini-batch m, gbar their mean, g* the true gradient (`truth.py`), v* the squared
standard error of its estimate, and S2 = sum_m |g_m - gbar|^2 / (M - 1):

    grad_norm             |gbar|
    grad_variance         S2, the trace of the covariance of one sample
    grad_variance_method  mean_m |g_m - g'_m|^2 / 2, g'_m: same mini-batch, other method noise
    grad_variance_data    S2 less that: law of total variance
    grad_snr              max(|gbar|^2 - S2 / M, 0) / S2
    grad_zero_rows        the share of rows of W whose gradient is exactly 0, a mean over samples
    true_norm             |g*|, from |g*|^2 - v*
    grad_bias2            |gbar - g*|^2 - S2 / M - v*, the squared bias without its sampling bias: may be < 0
    grad_mse              grad_bias2 + S2, the mean of |g_m - g*|^2
    rel_bias2, rel_variance, rel_mse   the three over |g*|^2
    cos_mean              <gbar, g*> / (|E g| |g*|), both norms without their sampling bias; NaN where
                          |E g|^2 is less than CLEAR times S2 / M: the ratio would be one of noise
    cos_sample            mean_m <g_m, g*> / (|g_m| |g*|), 0 for a g_m of 0
    rho                   descent efficiency, <E g, g*>^2 / (|g*|^2 E|g|^2) in [0, 1]

rho is the share of the exact gradient's guaranteed decrease in one step, on a loss with Lipschitz gradient,
that the estimator keeps at its best step size: bias and variance in one number that does not change when
the estimator is scaled. Its numerator is taken without its sampling bias, and so may be < 0.

`<column>_se` is the standard error of each: delete-one-block jackknife over the samples and, for what is
compared with the truth, over the blocks of its estimate (for cos_sample over the samples alone). Where there
is no bias, that of grad_bias2 is up to 1.5 times too large: its leading term is then quadratic.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.gradients.truth import Truth
from topkbench.methods import Method
from topkbench.optimizers import like
from topkbench.randomness import Normals, Repeated
from topkbench.step import WEIGHTS, Memory, at_temperature, copied, copies, gradients, rows_at_once
from topkbench.tasks import Task, Teacher

BLOCKS = 10
CLEAR = 10  # a mean gradient is told apart from 0 where its square is so many times its sampling variance
Columns = dict[str, Float[Tensor, " R"]]


@dataclass(frozen=True)
class Sampling:
    """How a gradient is sampled.

    Attributes:
        batch: Rows in a mini-batch, >= 1.
        samples: M, how many mini-batches, >= 2.

    Raises:
        ValueError: one of them is out of range.
    """

    batch: int
    samples: int

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be >= 1, got {self.batch}")
        if self.samples < 2:
            raise ValueError(f"the variance of a gradient needs at least 2 samples, got {self.samples}")


def measure(
    method: Method,
    task: Task,
    W: Float[Tensor, "R n d"],
    teacher: Teacher,
    normals: Normals,
    sampling: Sampling,
    *,
    truth: Truth | None = None,
    memory: Memory | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> Columns:
    """The columns above, one number a replicate, each followed by its standard error.

    Args:
        method: What is measured; its temperature may be a tensor `(R, 1, 1)`.
        task: What it is measured on.
        W: Where.
        teacher: What the task planted.
        normals: What the mini-batches and the method's noise are drawn from.
        sampling: How many mini-batches of how many rows.
        truth: What it is compared with; without it the columns from true_norm on are left out.
        memory: What the method has kept from training; it is read and left as it is.
        learned: What the task learns beside W.
    """
    blocks = _Blocks(W, min(BLOCKS, sampling.samples))
    at_once = max(1, rows_at_once(task, len(W)) // sampling.batch)
    data, first, second = (normals.child(name) for name in ("data", "method", "method again"))

    def sampled(m: int) -> tuple[Tensor, Tensor]:
        """Gradients on m fresh mini-batches `(m, R, ...)`, and on the same ones with other method noise."""
        values = {WEIGHTS: W, **(learned or {})}
        wide = {name: copies(value, m) for name, value in values.items()}
        many = {name: copies(part, m) for name, part in teacher.items()}
        drawn = task.sample(many, Repeated(data, m), sampling.batch)
        alike = _copies_of(method, m)
        both = [
            gradients(alike, task, wide, drawn, Repeated(noise, m), copied(memory, m))[1][WEIGHTS]
            for noise in ([first, second] if method.stochastic else [first])
        ]
        grad, again = (flat.unflatten(0, (m, len(W))) for flat in (both[0], both[-1]))
        return grad, again

    for start in range(0, sampling.samples, at_once):
        which = torch.arange(start, min(start + at_once, sampling.samples), device=W.device)
        blocks.add(*sampled(len(which)), which * blocks.count // sampling.samples, truth)
    return _with_errors(blocks, truth)


class _Blocks:
    """Running means and sums of squares of gradients, block by block."""

    def __init__(self, W: Float[Tensor, "R n d"], count: int) -> None:
        self.count, replicates = count, len(W)
        self.sizes = W.new_zeros(count)
        self.mean = W.new_zeros(count, *W.shape)
        self.sums = {
            name: W.new_zeros(count, replicates) for name in ("squares", "noise", "cosine", "zero_rows")
        }

    def add(self, grad: Tensor, again: Tensor, which: Tensor, truth: Truth | None) -> None:
        """Gradients `(m, R, ...)`, those with other method noise, and the block of each."""
        new = torch.zeros_like(self.sizes).index_add_(0, which, grad.new_ones(len(grad)))
        centre = torch.zeros_like(self.mean).index_add_(0, which, grad) / like(new.clamp(min=1), self.mean)
        shift = centre - self.mean
        both = (self.sizes + new).clamp(min=1)
        within = (grad - centre[which]).flatten(2).square().sum(-1)
        between = shift.flatten(2).square().sum(-1) * (self.sizes * new / both)[:, None]
        terms = {
            "squares": within,
            "noise": (grad - again).flatten(2).square().sum(-1) / 2,
            "cosine": _cosines(grad, truth),
            "zero_rows": (grad.flatten(3) == 0).all(-1).to(grad.dtype).mean(-1),
        }
        for name, term in terms.items():
            self.sums[name].index_add_(0, which, term)
        self.sums["squares"] += between
        self.mean += shift * like(new / both, self.mean)
        self.sizes += new

    def without(self, block: int | None) -> "_Blocks":
        """All of them but one."""
        if block is None:
            return self
        keep = torch.arange(self.count, device=self.sizes.device) != block
        rest = object.__new__(_Blocks)
        rest.count, rest.sizes, rest.mean = self.count - 1, self.sizes[keep], self.mean[keep]
        rest.sums = {name: each[keep] for name, each in self.sums.items()}
        return rest


def _with_errors(blocks: _Blocks, truth: Truth | None) -> Columns:
    whole = _columns(blocks, truth, truth.mean if truth else None)
    by_sample = [
        _columns(blocks.without(b), truth, truth.mean if truth else None) for b in range(blocks.count)
    ]
    by_truth = [_columns(blocks, truth, mean) for mean in truth.jackknife()] if truth else []
    table: Columns = {}
    for name, value in whole.items():
        variance = _jackknife(by_sample, name) + (_jackknife(by_truth, name) if by_truth else 0)
        table |= {name: value, f"{name}_se": variance.sqrt()}
    return table


def _jackknife(left_out: list[Columns], name: str) -> Float[Tensor, " R"]:
    """The variance from the values with one block left out each (Quenouille, Tukey)."""
    values = torch.stack([columns[name] for columns in left_out])
    return (values - values.mean(0)).square().sum(0) * ((len(values) - 1) / len(values))


def _columns(blocks: _Blocks, truth: Truth | None, target: Tensor | None) -> Columns:
    """The formulas of the module's docstring."""
    sizes, count = blocks.sizes, blocks.sizes.sum()
    weights = sizes / count
    means = blocks.mean.flatten(2)
    mean = (weights[:, None, None] * means).sum(0)
    within = blocks.sums["squares"].sum(0)
    total = (within + (sizes[:, None] * (means - mean).square().sum(-1)).sum(0)) / (count - 1).clamp(min=1)
    power = mean.square().sum(-1)
    of_method = blocks.sums["noise"].sum(0) / count
    unbiased = (power - total / count).clamp(min=0)
    columns = {
        "grad_norm": power.sqrt(),
        "grad_variance": total,
        "grad_variance_data": total - of_method,
        "grad_variance_method": of_method,
        "grad_snr": unbiased / total,
        "grad_zero_rows": blocks.sums["zero_rows"].sum(0) / count,
    }
    if truth is None or target is None:
        return columns
    target = target.flatten(1)
    true_power = (target.square().sum(-1) - truth.variance).clamp(min=0)
    noise = true_power < CLEAR * truth.variance  # a truth that is not told apart from 0
    relative = torch.where(noise, torch.nan, true_power)
    bias2 = (mean - target).square().sum(-1) - total / count - truth.variance
    along = (means * target).sum(-1)
    inner = (mean * target).sum(-1)
    spread = ((along - inner).square() * weights[:, None]).sum(0) / max(blocks.count - 1, 1)
    clear = unbiased > CLEAR * total / count
    size = power + total * (count - 1) / count  # the mean of |g_m|^2
    share = (inner.square() - spread) / (relative * size)
    return columns | {
        "true_norm": true_power.sqrt(),
        "grad_bias2": bias2,
        "grad_mse": bias2 + total,
        "rel_bias2": bias2 / relative,
        "rel_variance": total / relative,
        "rel_mse": (bias2 + total) / relative,
        "cos_mean": torch.where(clear, inner / (unbiased * relative).sqrt(), torch.nan),
        "cos_sample": blocks.sums["cosine"].sum(0) / count,
        "rho": torch.where(size == 0, 0, share),
    }


def _cosines(grad: Float[Tensor, "m R n d"], truth: Truth | None) -> Float[Tensor, "m R"]:
    if truth is None:
        return grad.new_zeros(grad.shape[:2])
    inner = (grad * truth.mean).flatten(2).sum(-1)
    size = grad.flatten(2).norm(dim=-1) * truth.mean.flatten(1).norm(dim=-1)
    return torch.where(size == 0, 0, inner / size)


def _copies_of(method: Method, count: int) -> Method:
    temperature = getattr(method, "temperature", None)
    if not isinstance(temperature, Tensor):
        return method
    return at_temperature(method, copies(temperature.flatten(), count))
