"""K times a sparse distribution: alpha-entmax without the cap at 1. Sum k, exact zeros, entries above 1."""

from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator
from topkbench.operators.threshold import entmax


@operator(
    bounded=False,
    hard_limit=False,
    infinite=False,
    sparse=True,
    family="threshold",
    cost="n, 3 to 8 passes",
    source="Martins & Astudillo 2016; Peters, Niculae & Martins 2019",
    checked="sorting; entmax",
)
def scaled_entmax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0, *, alpha: float = 1.5
) -> Float[Tensor, "*out n"]:
    """K times alpha-entmax: `k relu((alpha - 1) s / temperature - t)^(1 / (alpha - 1))`, sum k.

    The sparse twin of `scaled_softmax`, which alpha -> 1 goes to; alpha = 2 is k times sparsemax. How many
    entries are not 0 depends on the scores and the temperature and not on k; at a low temperature it is one,
    which has k. The capped maps, whose limit is the hard mask, are `sparsemax` and `entmax`.

    VJP: `k u (g - <u, g> / <u, 1>) / temperature`, u = (m / k)^(2 - alpha) where m > 0, else 0.

    Args:
        scores: `(..., n)`, floating point.
        k: In [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        alpha: In (1, 2]. 1.5 is the second source's entmax15, 2 the first one's sparsemax.

    Returns:
        The mask `(..., n)` in [0, k], sum k, sparse. All rows of the selection are the same.

    Raises:
        ValueError: k, temperature or alpha out of range.

    Cost: that of `entmax` at k = 1: the two largest scores, then 3 to 8 passes over the scores.

    Source: Martins & Astudillo 2016, "From Softmax to Sparsemax", eq. (2); Peters, Niculae & Martins 2019,
    "Sparse Sequence-to-Sequence Models". Differs: times k; the threshold by Newton steps instead of
    sorting or bisection.
    """
    # At k = 1 nothing reaches the cap but a single entry of 1, which has no gradient either way.
    count = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    return count * entmax.function(scores, 1, temperature, alpha=alpha)
