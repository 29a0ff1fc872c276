"""Softmax operators: k softmaxes in turn (the recursion: `_successive.py`), and the softmax scaled by k."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, check_size, largest, operator, transformed
from topkbench.operators._successive import Mask, Path

FAR = 1e18  # beyond every score, and still finite when it is divided by a low temperature twice


def scaled(scores: Tensor, temperature: Temperature) -> Tensor:
    """`scores / temperature` less a constant, so that large scores keep their digits."""
    if isinstance(temperature, int | float) and temperature == 1:
        return scores
    return (scores - scores.detach().amax(-1, keepdim=True)) / temperature


def _logits(scores: Tensor, temperature: Temperature, once: bool) -> tuple[Tensor, Tensor]:
    """v_1, and the rate by which a step pushes down what is taken: 1 where the temperature acts `once`."""
    rate = torch.as_tensor(1 / temperature, dtype=scores.dtype, device=scores.device)
    top = scores.detach().amax(-1, keepdim=True)
    # FAR stands for infinity: differences of infinite scores, and their slope in the temperature, are finite.
    centred = (scores - top.masked_fill(top.isinf(), 0)).clamp(-FAR, FAR)
    return centred * rate, torch.ones_like(rate) if once else rate


def _rows(scores: Tensor, k: int, temperature: Temperature, once: bool) -> Tensor:
    check_size(k * scores.numel(), scores, "successive softmax")
    path: Tensor = Path.apply(*_logits(scores, temperature, once), k)
    return path.softmax(-1)


def _mask(scores: Tensor, k: int | Tensor, temperature: Temperature, once: bool) -> Tensor:
    plain = not any(transformed(x) for x in (scores, temperature) if isinstance(x, Tensor))
    if isinstance(k, int) and plain:
        return Mask.apply(*_logits(scores, temperature, once), k)
    most = largest(k, scores.shape[-1])
    taken = torch.arange(most, device=scores.device) < torch.as_tensor(k, device=scores.device).unsqueeze(-1)
    return (_rows(scores, most, temperature, once) * taken.unsqueeze(-1).to(scores.dtype)).sum(-2)


def _softmax_mask(scores: Tensor, k: int | Tensor, temperature: Temperature) -> Tensor:
    return _mask(scores, k, temperature, once=False)


def _n3_mask(scores: Tensor, k: int | Tensor, temperature: Temperature) -> Tensor:
    return _mask(scores, k, temperature, once=True)


@operator(
    has_rows=True,
    streamed=_softmax_mask,
    bounded=False,
    monotone=False,
    infinite=False,
    family="softmax",
    cost="k n, memory k n; mask sqrt(k) n",
    source="Xie & Ermon 2019",
    checked="explicit formula",
)
def softmax(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """Successive softmax: the j-th row is the softmax of the scores less what rows 1..j-1 took.

    Row j is `a_j = softmax(v_j)`, with `v_1 = s / temperature`, `v_{j+1} = v_j + log(1 - a_j) / temperature`.

    VJP, g_j for row j (for the mask all are g): from w = 0, for j = k, ..., 1,
    `b = g_j - w / (temperature (1 - a_j))`, `w += a_j (b - <a_j, b>)`; then `w / temperature`.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The selection `(..., k, n)`: each row in (0, 1) and summing to 1. The mask, its sum over rows, sums
        to k, but an entry may exceed 1 at high temperature, and a larger score may get a smaller entry.

    Raises:
        ValueError: k or temperature out of range.

    Cost: k passes over the scores one after the other. The rows keep k n numbers for the backward pass, the
    mask sqrt(k) n where that is many, and finds the rest again.

    Source: Xie & Ermon 2019, "Reparameterizable Subset Sampling via Continuous Relaxations", eq. (4)-(6),
    without the Gumbel noise. Differs: log(1 - a) is exact, where the published code clamps 1 - a from
    below, so that temperature -> 0 gives the hard top-k of any scores that do not tie. As in the source, what
    is taken is pushed down in units of the scores: `softmax(c s, k, c temperature)` depends on c; of a tie
    each goes down by log 2 and may be passed by the next; above temperature 1 what leads by far leads again.
    """
    return _rows(scores, k, temperature, once=False)


@operator(
    has_rows=True,
    streamed=_n3_mask,
    bounded=False,
    hard_limit=False,
    infinite=False,
    family="softmax",
    cost="k n, memory k n; mask sqrt(k) n",
    source="Plötz & Roth 2018",
    checked="explicit formula",
)
def n3(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """Successive softmax with the temperature applied once: `v_{j+1} = v_j + log(1 - a_j)`.

    What is taken is pushed down in units of the temperature, by no more than it stands above the rest: two
    scores that are far above the others share the first two rows, and a low temperature does not make every
    row hard.

    VJP: as that of `softmax`, but `b = g_j - w / (1 - a_j)`.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The selection `(..., k, n)`: each row in (0, 1) and summing to 1. An entry of the mask may exceed 1.

    Raises:
        ValueError: k or temperature out of range.

    Cost: k passes over the scores one after the other. The rows keep k n numbers for the backward pass, the
    mask sqrt(k) n where that is many, and finds the rest again.

    Source: Plötz & Roth 2018, "Neural Nearest Neighbors Networks", as their published code has it; the paper
    divides by the temperature at each step, and is then `softmax`. Differs: log(1 - a) is exact.
    """
    return _rows(scores, k, temperature, once=True)


@operator(
    bounded=False,
    hard_limit=False,
    infinite=False,
    family="softmax",
    cost="n",
    source="folklore",
    checked="explicit formula",
)
def scaled_softmax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """K times the softmax: `k softmax(s / temperature)`.

    The naive baseline. At a low temperature it goes to k times the argmax and not to the hard mask.

    VJP: `m (g - <m, g> / k) / temperature`.

    Args:
        scores: `(..., n)`, floating point.
        k: In [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, k), sum k. All rows of the selection are the same.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one softmax.

    Source: folklore.
    """
    count = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    return count * scaled(scores, temperature).softmax(-1)
