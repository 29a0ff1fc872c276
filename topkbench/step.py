"""Where a task and a method meet: one forward pass at W on a batch, and its gradient."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Method, Step
from topkbench.randomness import Noise
from topkbench.tasks import Batch, Task, scores_of

Memory = dict[str, Tensor]
BUDGET = 1 << 21  # numbers in the largest tensor of a pass that is cut into pieces: 8 MB


def surrogate(
    method: Method,
    task: Task,
    W: Float[Tensor, "R n d"],
    batch: Batch,
    noise: Noise,
    memory: Memory | None = None,
) -> Float[Tensor, "R B"]:
    """The method's loss per row; its gradient is the method's estimate. It may replace what memory holds."""
    scores = scores_of(W, batch.x)
    step = Step(
        W=W,
        x=batch.x,
        scores=scores,
        k=task.k,
        wants=task.wants,
        loss=lambda part: task.loss(part, scores, batch),
        noise=noise,
        memory={} if memory is None else memory,
    )
    return method(step)


def gradient(
    method: Method,
    task: Task,
    W: Float[Tensor, "R n d"],
    batch: Batch,
    noise: Noise,
    memory: Memory | None = None,
) -> tuple[Float[Tensor, " R"], Float[Tensor, "R n d"]]:
    """The loss, a mean over the rows of the batch, and its gradient, for each replicate."""
    with torch.enable_grad():
        W = W.detach().requires_grad_()
        loss = surrogate(method, task, W, batch, noise, memory).mean(-1)
        total = loss.sum()
    if not total.requires_grad:  # a hard mask with nothing beside it: no path leads back to W
        return loss, torch.zeros_like(W)
    (grad,) = torch.autograd.grad(total, W, materialize_grads=True)
    return loss.detach(), grad


def copies(tensor: Tensor, count: int) -> Tensor:
    """(R, ...) -> (count * R, ...), copy 0 of all replicates first."""
    return tensor.repeat(count, *[1] * (tensor.dim() - 1))


def copied(memory: Memory | None, count: int = 1) -> Memory:
    """What a method remembers, to look at a gradient with and throw away; for `count` copies side by side."""
    return {name: copies(tensor, count) for name, tensor in (memory or {}).items()}


def at_temperature(method: Method, temperature: Float[Tensor, " R"]) -> Method:
    """The method with each replicate's own temperature."""
    return dataclasses.replace(method, temperature=temperature[:, None, None])  # type: ignore[type-var]


def rows_at_once(task: Task, replicates: int) -> int:
    """How many rows of x go through a method together where nothing else says: memory is bounded by it."""
    return max(1, BUDGET // (replicates * task.n * (task.k if task.wants == "values" else 1)))
