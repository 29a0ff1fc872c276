"""Where a task and a method meet: one forward pass at W on a batch, and its gradient."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Inputs, Method, Step
from topkbench.randomness import Noise
from topkbench.tasks import Batch, KnownExpectation, KnownInputs, Task

Memory = dict[str, Tensor]
WEIGHTS = "W"
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
    scores = task.scores(W, batch)
    step = Step(
        W=W,
        x=batch.x,
        scores=scores,
        k=task.k,
        wants=task.wants,
        loss=lambda part: task.loss(part, scores, batch),
        noise=noise,
        memory={} if memory is None else memory,
        inputs=_inputs(task, W, batch),
        expected=_expected(task, W, batch),
    )
    return method(step)


def _inputs(task: Task, W: Float[Tensor, "R n d"], batch: Batch) -> Inputs | None:
    """The batch's rows at other x, where the task knows how x is distributed."""
    if not isinstance(task, KnownInputs):
        return None

    def elsewhere(replicates: slice, rows: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
        there = task.moved(batch.replicates(replicates), rows, x)
        scores = task.scores(W[replicates], there)
        return lambda part: task.loss(part, scores, there)

    return Inputs(elsewhere, task.line_density, task.line_mass)


def _expected(
    task: Task, W: Float[Tensor, "R n d"], batch: Batch
) -> Callable[[], Float[Tensor, "R B"]] | None:
    """The exact mean loss, the same for each row of the batch, where the task knows it."""
    if not isinstance(task, KnownExpectation):
        return None
    return lambda: task.population_loss(W, batch)[:, None].expand(batch.x.shape[:2])


def gradient(
    method: Method,
    task: Task,
    W: Float[Tensor, "R n d"],
    batch: Batch,
    noise: Noise,
    memory: Memory | None = None,
) -> tuple[Float[Tensor, " R"], Float[Tensor, "R n d"]]:
    """The loss, a mean over the rows of the batch, and its gradient in W, for each replicate."""
    loss, grads = gradients(method, task, {WEIGHTS: W}, batch, noise, memory)
    return loss, grads[WEIGHTS]


def gradients(
    method: Method,
    task: Task,
    learned: dict[str, Tensor],
    batch: Batch,
    noise: Noise,
    memory: Memory | None = None,
) -> tuple[Float[Tensor, " R"], dict[str, Tensor]]:
    """The same for all that is learned: W is called WEIGHTS, what a task learns besides has its own name."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in learned.items()}
        others = {name: leaf for name, leaf in leaves.items() if name != WEIGHTS}
        if others:
            batch = dataclasses.replace(batch, learned=others)
        loss = surrogate(method, task, leaves[WEIGHTS], batch, noise, memory).mean(-1)
        total = loss.sum()
    if not total.requires_grad:  # a hard mask with nothing beside it: no path leads back to W
        return loss, {name: torch.zeros_like(value) for name, value in learned.items()}
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return loss.detach(), dict(zip(leaves, grads, strict=True))


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
