"""How a method's gradient varies at a fixed W: its size, its variance by source, its signal-to-noise ratio.

M fresh mini-batches per replicate are so many more replicates of the same W. They are streamed: a
chunk at a time goes through the method, and only a running mean and a running sum of squares are kept
(Chan, Golub & LeVeque 1983), so memory does not grow with M.

With g_m the gradient on mini-batch m and gbar their mean,

    total    =  sum_m |g_m - gbar|^2 / (M - 1)          trace of the covariance of one sample
    method   =  mean_m |g_m - g'_m|^2 / 2               g'_m: same mini-batch, other method noise
    data     =  total - method                          law of total variance
    snr      =  max(|gbar|^2 - total / M, 0) / total    the numerator without its bias
"""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Method
from topkbench.randomness import Normals, Repeated
from topkbench.step import Memory, at_temperature, copied, copies, gradient, rows_at_once
from topkbench.tasks import Batch, Task, Teacher

COLUMNS = ("grad_norm", "grad_variance", "grad_variance_data", "grad_variance_method", "grad_snr")


def measure(
    method: Method,
    task: Task,
    W: Float[Tensor, "R n d"],
    teacher: Teacher,
    normals: Normals,
    batch: int,
    samples: int,
    memory: Memory | None = None,
) -> dict[str, Float[Tensor, " R"]]:
    """The columns of COLUMNS, one number a replicate.

    Args:
        method: What is measured; its temperature may be a tensor `(R, 1, 1)`.
        task: What it is measured on.
        W: Where.
        teacher: What the task planted.
        normals: What the mini-batches and the method's noise are drawn from.
        batch: Rows in a mini-batch.
        samples: M, how many mini-batches, >= 2.
        memory: What the method has kept from training; it is read and left as it is.

    Raises:
        ValueError: samples < 2.
    """
    if samples < 2:
        raise ValueError(f"the variance of a gradient needs at least 2 samples, got {samples}")
    replicates = len(W)
    at_once = max(1, rows_at_once(task, replicates) // batch)
    data, first, second = (normals.child(name) for name in ("data", "method", "method again"))
    count, mean, squares, noise = 0, torch.zeros_like(W), W.new_zeros(replicates), W.new_zeros(replicates)
    while count < samples:
        m = min(at_once, samples - count)
        drawn = task.sample(
            {name: copies(part, m) for name, part in teacher.items()}, Repeated(data, m), batch
        )
        alike = _copies_of(method, m)

        def gradients(noise: Normals, m: int = m, alike: Method = alike, drawn: Batch = drawn) -> Tensor:
            kept = copied(memory, m)
            flat = gradient(alike, task, copies(W, m), drawn, Repeated(noise, m), kept)[1]
            return flat.unflatten(0, (m, replicates))

        grad = gradients(first)
        centre = grad.mean(0)
        shift = centre - mean
        within = (grad - centre).square().sum((0, 2, 3))
        squares += within + shift.square().sum((1, 2)) * (count * m / (count + m))
        mean += shift * (m / (count + m))
        count += m
        if method.stochastic:
            noise += (grad - gradients(second)).square().sum((0, 2, 3)) / 2
    total, of_method = squares / (samples - 1), noise / samples
    power = mean.square().sum((1, 2))
    columns = (
        power.sqrt(),
        total,
        total - of_method,
        of_method,
        (power - total / samples).clamp(min=0) / total,
    )
    return dict(zip(COLUMNS, columns, strict=True))


def _copies_of(method: Method, count: int) -> Method:
    temperature = getattr(method, "temperature", None)
    if not isinstance(temperature, Tensor):
        return method
    return at_temperature(method, copies(temperature.flatten(), count))
