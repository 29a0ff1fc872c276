"""Independent gates, one for each score, of which k are open in the mean."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, prepared
from topkbench.operators._kernels import Gaussian, Logistic
from topkbench.operators._threshold import centred, threshold

SURE = 1e4  # a level that no noise reaches: uniforms are >= 2^-60, whose logit is -42


def levels(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature, kernel: Logistic | Gaussian
) -> Float[Tensor, "*rows n"]:
    """`a_i = s_i / temperature - t` with t such that `sum_i F(a_i) = k`.

    F(a_i) is the mask of the threshold operator with that kernel (`entropic`, `gaussian`), and the chance
    that gate i is open; a_i is what its noise is added to. Where F(a_i) rounds to 0 or 1, a_i does not, and
    has a derivative.

    VJP: `(g - w <1, g>) / temperature`, w = F'(a) / sum F'(a).

    Args:
        scores: `(..., n)`.
        k: How many are open in the mean, in [1, n]; with n all a_i are SURE.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        kernel: F.

    Returns:
        `(..., n)` in [-SURE, SURE].
    """
    temperature = prepared(scores, k, temperature)
    mask = threshold(scores.detach(), k, temperature, kernel)
    bound, limits = torch.finfo(scores.dtype).max ** 0.5, torch.finfo(scores.dtype)
    finite = scores.clamp(-bound, bound)
    if k == scores.shape[-1]:
        return mask * SURE + 0 * finite
    density = kernel.density(mask)
    total = density.sum(-1, keepdim=True)
    # t from the entry that is furthest from 0 and 1, which is known to the last digits; where there is none,
    # halfway between the k-th and the next.
    u = centred(scores.detach(), k)[0] / temperature
    best = density.argmax(-1, keepdim=True)
    known = kernel.quantile(mask.gather(-1, best).clamp(limits.tiny, 1 - limits.eps / 2))
    value = (u - torch.where(total == 0, 0, u.gather(-1, best) - known)).clamp(-SURE, SURE)
    weight = density / (total + (total == 0).to(total.dtype))
    moving = (finite - (weight * finite).sum(-1, keepdim=True)) / temperature
    return value + (moving - moving.detach())
