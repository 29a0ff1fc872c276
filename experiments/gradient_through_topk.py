"""The example the project grew from: is the loss after top-k differentiable with respect to W?

Stack Overflow 67570529: x (6) goes through W (6 x 6), the 3 largest of q = W x are kept, and the loss is the
sum of their squares. Its gradient computed in two ways, then every method's gradient beside it:

    python experiments/gradient_through_topk.py
"""

import pandas as pd
import torch

from topkbench.choices import available
from topkbench.config import built, misfit
from topkbench.methods import Method, Step
from topkbench.randomness import Normals
from topkbench.tasks import Values

K = 3
X = torch.tensor([0.1511, 0.5990, 0.6338, 0.5137, 0.5203, 0.0560])
W = torch.tensor(
    [
        [0.2541, 0.6699, 0.5311, 0.7801, 0.5042, 0.5475],
        [0.7523, 0.1331, 0.7670, 0.8132, 0.0524, 0.0269],
        [0.3974, 0.2880, 0.9142, 0.9906, 0.4401, 0.3984],
        [0.7956, 0.2071, 0.2209, 0.6192, 0.2054, 0.7693],
        [0.8587, 0.8415, 0.6033, 0.3812, 0.2498, 0.9813],
        [0.9033, 0.0417, 0.2272, 0.1576, 0.9087, 0.3284],
    ]
)


def by_autograd() -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients with respect to W and x that autograd finds through `torch.topk`."""
    w, x = W.clone().requires_grad_(), X.clone().requires_grad_()
    (w @ x).topk(K).values.square().sum().backward()
    assert w.grad is not None
    assert x.grad is not None
    return w.grad, x.grad


def by_selection() -> tuple[torch.Tensor, torch.Tensor]:
    """By hand: v = S W x with the selection matrix S, so dL/dW = S^T (2 v) x^T and dL/dx = W^T S^T (2 v)."""
    S = torch.eye(6)[(W @ X).topk(K).indices]
    v = S @ W @ X
    return torch.outer(S.T @ (2 * v), X), W.T @ S.T @ (2 * v)


def by_method(method: Method) -> torch.Tensor:
    """dL/dW by a method: one replicate, one row of x."""
    w, x = W.clone()[None].requires_grad_(), X[None, None]
    step = Step(w, x, x @ w.mT, K, "values", lambda v: v.square().sum(-1), Normals([0]))
    method(step).sum().backward()
    assert w.grad is not None
    return w.grad[0]


def comparison() -> pd.DataFrame:
    """Every method's gradient, at its default temperature, and how far it is from the hard one.

    There is one x, so that dL/dW = (dL/dq) x^T whatever the method: the six numbers dL/dq are all of it.
    """
    hard = by_autograd()[0]
    rows = []
    for name in available("method"):
        method = built("method", name)
        if misfit(method, Values(*W.shape, K)) is not None:
            continue
        grad = by_method(method)
        cosine = torch.cosine_similarity(grad.flatten(), hard.flatten(), dim=0).clamp(-1, 1)
        far = (grad - hard).norm() / hard.norm()
        of_scores = grad @ X / X.square().sum()
        rows.append([name, *of_scores.tolist(), far.item(), torch.rad2deg(cosine.acos()).item()])
    columns = ["method", *(f"dL/dq{i}" for i in range(6)), "|g - hard| / |hard|", "angle"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[-2], kind="stable")


def main() -> None:
    """Print both ways and the comparison."""
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)
    (w, x), (w_too, x_too) = by_autograd(), by_selection()
    print(f"q = W x = {(W @ X).numpy().round(4)}; kept: {(W @ X).topk(K).indices.tolist()}\n")
    print(f"dL/dW by autograd through torch.topk\n{w}\n\ndL/dx\n{x}\n")
    apart = max((w - w_too).abs().max().item(), (x - x_too).abs().max().item())
    print(f"by the selection matrix, held constant: the largest difference is {apart:.1g}\n")
    print("every method's gradient beside it, dL/dW = (dL/dq) x^T; the angle to the hard one in degrees")
    print(comparison().to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
