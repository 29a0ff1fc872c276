"""The hard top-k: k ones on the k largest scores. Its mask is piecewise constant, its values are not."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import check


def hard_values(scores: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows k"]:
    """The k largest scores, descending: `torch.topk` and its gradient.

    The gradient sends `dL/dv_j` to the index that holds rank j and nothing elsewhere: exact wherever
    no two of the k+1 largest scores tie, and `v` itself is continuous everywhere.

    Raises:
        ValueError: k outside [1, n].
    """
    check(scores, k)
    return scores.topk(k, dim=-1).values


def hard_mask(scores: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows n"]:
    """Ones on the k largest scores, zeros elsewhere; exactly k ones also at ties. A constant for autograd.

    Raises:
        ValueError: k outside [1, n].
    """
    check(scores, k)
    index = scores.detach().topk(k, dim=-1).indices
    return torch.zeros_like(scores, requires_grad=False).scatter(-1, index, 1.0)


def hard_selection(scores: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows k n"]:
    """Row j is the one-hot of the index of the j-th largest score. A constant for autograd.

    Raises:
        ValueError: k outside [1, n].
    """
    check(scores, k)
    index = scores.detach().topk(k, dim=-1).indices
    rows = torch.zeros((*index.shape, scores.shape[-1]), dtype=scores.dtype, device=scores.device)
    return rows.scatter(-1, index.unsqueeze(-1), 1.0)
