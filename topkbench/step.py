"""Where a task and a method meet: one forward pass at W on a batch, and its gradient."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Method, Step
from topkbench.randomness import Noise
from topkbench.tasks import Batch, Task, scores_of

BUDGET = 1 << 21  # numbers in the largest tensor of a pass that is cut into pieces: 8 MB


def surrogate(
    method: Method, task: Task, W: Float[Tensor, "R n d"], batch: Batch, noise: Noise
) -> Float[Tensor, "R B"]:
    """The method's loss per row; its gradient is the method's estimate."""
    scores = scores_of(W, batch.x)
    step = Step(
        W=W,
        x=batch.x,
        scores=scores,
        k=task.k,
        wants=task.wants,
        loss=lambda part: task.loss(part, scores, batch),
        noise=noise,
    )
    return method(step)


def gradient(
    method: Method, task: Task, W: Float[Tensor, "R n d"], batch: Batch, noise: Noise
) -> tuple[Float[Tensor, " R"], Float[Tensor, "R n d"]]:
    """The loss, a mean over the rows of the batch, and its gradient, for each replicate."""
    with torch.enable_grad():
        W = W.detach().requires_grad_()
        loss = surrogate(method, task, W, batch, noise).mean(-1)
        total = loss.sum()
    if not total.requires_grad:  # a hard mask with nothing beside it: no path leads back to W
        return loss, torch.zeros_like(W)
    (grad,) = torch.autograd.grad(total, W, materialize_grads=True)
    return loss.detach(), grad


def at_temperature(method: Method, temperature: Float[Tensor, " R"]) -> Method:
    """The method with each replicate's own temperature."""
    return dataclasses.replace(method, temperature=temperature[:, None, None])  # type: ignore[type-var]


def rows_at_once(task: Task, replicates: int) -> int:
    """How many rows of x go through a method together where nothing else says: memory is bounded by it."""
    return max(1, BUDGET // (replicates * task.n * (task.k if task.wants == "values" else 1)))
