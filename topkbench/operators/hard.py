"""The hard top-k: k ones on the k largest scores. Its mask is piecewise constant, its values are not."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import check, check_size

LONG, MANY = 32, 1 << 14  # scores in a row, and in all


def hard_values(scores: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows k"]:
    """The k largest scores, descending: `torch.topk` and its gradient.

    The gradient sends `dL/dv_j` to the index that holds rank j and nothing elsewhere: exact wherever
    no two of the k+1 largest scores tie, and `v` itself is continuous everywhere.

    Raises:
        ValueError: k outside [1, n].
    """
    check(scores, k)
    return scores.topk(k, dim=-1).values


def hard_mask(scores: Float[Tensor, "*rows n"], k: int | Tensor) -> Float[Tensor, "*out n"]:
    """Ones on the k largest scores, zeros elsewhere; exactly k ones also at ties. A constant for autograd.

    Its derivative is 0 wherever no two scores tie for ranks k and k+1, and that is what autograd gets.

    Args:
        scores: `(..., n)`, floating point.
        k: In [1, n]; a tensor that broadcasts with the leading dimensions gives each row its own.

    Raises:
        ValueError: k outside [1, n].
    """
    check(scores, k)
    return kept(scores, k)


def kept(scores: Tensor, k: int | Tensor) -> Tensor:
    """`hard_mask` unchecked: a tensor k may have more rows than the scores."""
    scores = scores.detach()
    # Not where it is compiled: torch 2.13's Inductor may read the zeros before the ones are in them.
    if isinstance(k, int) and not torch.compiler.is_compiling():
        index = scores.topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(scores).scatter(-1, index, 1.0)
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (place < (k if isinstance(k, int) else k.unsqueeze(-1))).to(scores.dtype)


def hard_mask_of_data(scores: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows n"]:
    """`hard_mask` where nothing is traced, mapped or compiled: targets of a task, say.

    On a CPU, and where there is enough to do, by NumPy's partial sort, which is vectorised as torch's is not:
    in a quarter to four fifths of the time.

    Raises:
        ValueError: k outside [1, n].
    """
    check(scores, k)
    n = scores.shape[-1]
    fits = scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64)
    if not fits or n < LONG or scores.numel() < MANY:
        return kept(scores, k)
    scores = scores.detach()
    kth = torch.from_numpy(np.partition(scores.numpy(), n - k, -1)[..., n - k, None].copy())
    mask = (scores >= kth).to(scores.dtype)
    wrong = mask.sum(-1) != k  # a tie for rank k, or NaN
    if wrong.any():
        mask[wrong] = kept(scores[wrong], k)
    return mask


def straight_through(hard: Float[Tensor, "*part"], soft: Float[Tensor, "*part"]) -> Float[Tensor, "*part"]:
    """`hard`, to the last bit, with the gradient of a finite `soft`."""
    return hard + (soft - soft.detach())


def hard_selection(scores: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows k n"]:
    """Row j is the one-hot of the index of the j-th largest score. A constant for autograd.

    Raises:
        ValueError: k outside [1, n].
    """
    check(scores, k)
    check_size(k * scores.numel(), scores, "a selection")
    index = scores.detach().topk(k, dim=-1).indices
    places = torch.arange(scores.shape[-1], device=scores.device)
    return (index.unsqueeze(-1) == places).to(scores.dtype)
