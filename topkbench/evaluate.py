"""How good a W is, on held-out rows and with the hard top-k, whatever it was trained with."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Method
from topkbench.operators import hard_mask, hard_values
from topkbench.randomness import Noise
from topkbench.step import Memory, copied, surrogate
from topkbench.tasks import Batch, Task, scores_of

AT_ONCE = 128  # rows; no function of R, since the noise of a stochastic method is drawn by the piece
COLUMNS = ("hard_loss", "relaxed_loss", "recall", "distance")


@torch.no_grad()
def evaluate(
    method: Method,
    task: Task,
    W: Float[Tensor, "R n d"],
    test: Batch,
    noise: Noise,
    memory: Memory | None = None,
) -> dict[str, Float[Tensor, " R"]]:
    """The columns of COLUMNS, one number a replicate.

    Args:
        method: Its own loss is the relaxed loss; the other columns do not depend on it.
        task: Whose loss, recall and distance.
        W: What is evaluated.
        test: Held-out rows, without target noise.
        noise: What a stochastic method draws from.
        memory: What the method has kept from training; it is read and left as it is.
    """
    matched = task.match(W, test.teacher)
    sums = W.new_zeros(3, len(W))
    rows = test.x.shape[1]
    for start in range(0, rows, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        piece = Batch(test.x[:, part], test.target[:, part], test.teacher)
        sums += torch.stack(
            [
                hard_loss(task, W, piece).sum(-1),
                surrogate(method, task, W, piece, noise, copied(memory)).sum(-1),
                recall(task, matched, piece).sum(-1),
            ]
        )
    means = [*(sums / rows), task.distance(matched, test.teacher)]
    return dict(zip(COLUMNS, means, strict=True))


def hard_loss(task: Task, W: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B"]:
    """The task's loss per row with the hard top-k: what every method is judged by."""
    scores = scores_of(W, batch.x)
    part = hard_values if task.wants == "values" else hard_mask
    return task.loss(part(scores, task.k), scores, batch)


def recall(task: Task, matched: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B"]:
    """The share of the teacher's top k that is in the learner's, per row; W matched to the teacher."""
    ours = hard_mask(scores_of(matched, batch.x), task.k)
    theirs = hard_mask(scores_of(batch.teacher["W"], batch.x), task.k)
    return (ours * theirs).sum(-1) / task.k
