"""How good a W is, on held-out rows and with the hard top-k, whatever it was trained with."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Method
from topkbench.operators import hard_mask, hard_values
from topkbench.randomness import Noise
from topkbench.step import Memory, copied, surrogate
from topkbench.tasks import Batch, KnownExpectation, Task

AT_ONCE = 128  # rows; no function of R, since the noise of a stochastic method is drawn by the piece


@torch.no_grad()
def evaluate(
    method: Method,
    task: Task,
    W: Float[Tensor, "R n d"],
    test: Batch,
    noise: Noise,
    memory: Memory | None = None,
) -> dict[str, Float[Tensor, " R"]]:
    """hard_loss, relaxed_loss and the task's own metrics, one number a replicate.

    Args:
        method: Its own loss is the relaxed loss; the other columns do not depend on it.
        task: Whose loss and metrics.
        W: What is evaluated.
        test: Held-out rows, without target noise.
        noise: What a stochastic method draws from.
        memory: What the method has kept from training; it is read and left as it is.
    """
    hard, relaxed = W.new_zeros(len(W)), W.new_zeros(len(W))
    for piece in test.pieces(AT_ONCE):
        hard += hard_loss(task, W, piece).sum(-1)
        relaxed += surrogate(method, task, W, piece, noise, copied(memory)).sum(-1)
    rows = test.x.shape[1]
    return {"hard_loss": hard / rows, "relaxed_loss": relaxed / rows, **task.metrics(W, test)}


def hard_loss(task: Task, W: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B"]:
    """The task's loss per row with the hard top-k: what every method is judged by.

    Where the subset is random and its mean loss exact, that mean.
    """
    if isinstance(task, KnownExpectation):
        return task.population_loss(W, batch)[:, None].expand(batch.x.shape[:2])
    scores = task.scores(W, batch)
    part = hard_values if task.wants == "values" else hard_mask
    return task.loss(part(scores, task.k), scores, batch)
