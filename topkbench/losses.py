"""Losses with the top-k inside: supervised by a label, so that no mask reaches a model."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.operators._contract import Temperature, check
from topkbench.operators.subset import log_normalizer


def smooth_topk_svm(
    scores: Float[Tensor, "*rows n"], labels: Int[Tensor, "*rows"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows"]:
    """Smooth top-k hinge loss: low where the label's score is a margin above all but k - 1 of the others.

    With `u = exp(s / (k tau))`, tau the temperature, y the label, e_j the elementary symmetric polynomials,

        L = tau log(e^(1/tau) e_k(u without u_y) + u_y e_{k-1}(u without u_y))
          - tau log(u_y e_{k-1}(u without u_y))

    As tau goes to 0 it is `max(0, 1 + (s_[k] of the others - s_y) / k)`; at k = 1 and tau = 1 it is the cross
    entropy with a margin of 1. Its gradient is the difference of the marginals of two k-subset laws over k.

    Args:
        scores: `(..., n)`, floating point.
        labels: `(...)`, whole numbers in [0, n) (not looked at).
        k: In [1, n].
        temperature: > 0, tau; a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The loss of each row, >= 0.

    Raises:
        ValueError: k or temperature out of range.

    Cost: two log normalisers of the k-subset law, O(n k) each; finite in float32.

    Source: Berrada, Zisserman & Kumar 2018, "Smooth Loss Functions for Deep Top-k Classification", section
    3.2. Differs: the polynomials from a tree of probabilities instead of logarithms.
    """
    check(scores, k, temperature)
    tau = temperature if isinstance(temperature, Tensor) else scores.new_tensor(temperature)
    is_label = torch.arange(scores.shape[-1], device=scores.device) == labels.unsqueeze(-1)
    own = scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # A label's score that is lower by k stands for the margin: u_y e^(-1/tau).
    either = log_normalizer(scores - k * is_label.to(scores.dtype), k, k * tau)
    rest = scores.masked_fill(is_label, -torch.inf)
    with_label = log_normalizer(rest, k - 1, k * tau) if k > 1 else torch.zeros_like(own)
    tau = tau.squeeze(-1) if tau.dim() else tau
    return 1 + tau * (either - with_label) - own / k
