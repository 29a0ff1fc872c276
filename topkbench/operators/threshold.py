"""Threshold operators: m_i = F(s_i / temperature - t) with t such that sum_i m_i = k, one for each F.

The solver, the vector-Jacobian product they share and its derivation are in `_threshold.py`, the F in
`_kernels.py`.
"""

from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator
from topkbench.operators._kernels import Cauchy, Exponential, Gaussian, Laplace, Logistic, Power
from topkbench.operators._loop import constant
from topkbench.operators._threshold import threshold

FAMILY, COST = "threshold", "n, 3 to 5 passes"


def _power(p: float) -> Power:
    # 1 / (4/3 - 1) rounds to something beside 3, and whole powers are several times as fast.
    return Power(constant(round(1 / (p - 1), 12)))


@operator(
    family=FAMILY,
    cost=COST,
    source="Amos, Koltun & Kolter 2019 (LML); Xie et al. 2020 (SOFT)",
    checked="bracketing; qfeval-functions",
)
def entropic(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Entropic projection onto the capped simplex: logistic threshold with sum k.

    Solves `max_m <m, s> - temperature * sum(m log m + (1-m) log(1-m))` subject to `0 <= m <= 1, sum m = k`;
    so `m_i = sigmoid(s_i / temperature - t)`.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a = m (1 - m).

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1), sum k; as smooth as the logistic function.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1), then 3 to 5 passes over the scores.

    Source: Amos, Koltun & Kolter 2019, "The Limited Multi-Label Projection Layer", eq. (4); it is also what
    the Sinkhorn iterations of Xie et al. 2020 converge to. Differs: the bracket does not depend on the
    scores, Newton steps inside it, no tolerance to set.
    """
    return threshold(scores, k, temperature, Logistic())


@operator(family=FAMILY, cost=COST, source="Struski, Bednarczyk, Podolak & Tabor 2025", checked="bracketing")
def lapsum(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Laplace threshold with sum k (LapSum): F is the distribution function of the Laplace law.

    `m_i = e^u / 2` where `u = s_i / temperature - t` is below 0, `1 - e^-u / 2` above.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a = min(m, 1 - m).

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; the alpha of the source.

    Returns:
        The mask `(..., n)` in (0, 1), sum k; once differentiable, with a kink in the derivative at 1/2.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1), then 3 to 5 passes over the scores.

    Source: Struski, Bednarczyk, Podolak & Tabor 2025, "LapSum - One Method to Differentiate Them All".
    Differs: the threshold by Newton steps, where the source sorts all scores and solves a quadratic.
    """
    return threshold(scores, k, temperature, Laplace())


@operator(family=FAMILY, cost=COST, source="this project", checked="bracketing")
def gaussian(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Gaussian threshold with sum k: F is the normal distribution function. Lighter tails than `entropic`.

    The deterministic companion of Gaussian perturbation: item i is taken where `s_i + temperature * Z_i`
    exceeds one common threshold, in the mean over Z.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a the normal density at the quantile of m.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1), sum k; smooth.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1), then about 3 passes over the scores with an error function, which is several times
    as dear as a sigmoid; the backward pass takes the normal quantile of the mask.

    Source: this project; no publication of it was found.
    """
    return threshold(scores, k, temperature, Gaussian())


@operator(
    family=FAMILY, cost=COST, source="this project; kernel of Petersen et al. 2022", checked="bracketing"
)
def cauchy(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Cauchy threshold with sum k: tails so heavy that a gradient reaches scores far from the threshold.

    `m_i = atan(s_i / temperature - t) / pi + 1/2`.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a = sin(pi m)^2 / pi.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1), sum k; smooth. It goes to the hard mask only as fast as
        n temperature / gap.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1), then 3 to 6 passes over the scores with an arc tangent.

    Source: this project; the kernel is that of the Cauchy swaps of Petersen, Borgelt, Kuehne & Deussen 2022,
    "Monotonic Differentiable Sorting Networks".
    """
    return threshold(scores, k, temperature, Cauchy())


@operator(
    sparse=True,
    family=FAMILY,
    cost=COST,
    source="Martins & Astudillo 2016; Malaviya et al. 2018",
    checked="pooling of kinks; entmax, jaxopt, optax",
)
def sparsemax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Euclidean projection of scores / temperature onto the capped simplex; at k = 1 exactly sparsemax.

    Solves `min_m |m - s/temperature|^2` subject to `0 <= m <= 1, sum m = k`; so
    `m_i = clip(s_i / temperature - t, 0, 1)`. It is the hard mask, and its gradient 0, as soon as
    the k-th and (k+1)-th score are a temperature apart.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a = 1 where 0 < m < 1, else 0.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in [0, 1], sum k, sparse; piecewise linear.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1), then 3 to 7 passes over the scores.

    Source: Martins & Astudillo 2016, "From Softmax to Sparsemax", eq. (2) at k = 1; Malaviya, Ferreira &
    Martins 2018, "Sparse and Constrained Attention", for the cap. Differs: threshold by safeguarded Newton
    steps instead of sorting; the derivative at a kink is that of the flat side.
    """
    return threshold(scores, k, temperature, Power(1.0))


@operator(
    sparse=True,
    family=FAMILY,
    cost=COST,
    source="Peters, Niculae & Martins 2019",
    checked="pooling of kinks; entmax",
)
def entmax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0, *, alpha: float = 1.5
) -> Float[Tensor, "*out n"]:
    """alpha-entmax with the entries capped at 1 and sum k; at k = 1 exactly alpha-entmax.

    `m_i = clip((alpha - 1) s_i / temperature - t, 0, 1)^(1 / (alpha - 1))`; alpha = 2 is `sparsemax`, and
    alpha -> 1 goes to a constrained softmax.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a = m^(2 - alpha) where 0 < m < 1, else 0.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        alpha: In (1, 2]. The smaller, the smoother at 0 and the denser; 1.5 is the source's entmax15.

    Returns:
        The mask `(..., n)` in [0, 1], sum k, sparse.

    Raises:
        ValueError: k, temperature or alpha out of range.

    Cost: one top-(k+1), then 4 to 8 passes over the scores.

    Source: Peters, Niculae & Martins 2019, "Sparse Sequence-to-Sequence Models", without the cap
    at k = 1. Differs: capped, sum k; Newton steps instead of sorting or bisection.
    """
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha must be in (1, 2], got {alpha}")
    return threshold(scores, k, temperature / (alpha - 1), _power(alpha))


@operator(
    sparse=True, family=FAMILY, cost=COST, source="Sander et al. 2023", checked="pooling of kinks; entmax"
)
def pnorm(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0, *, p: float = 4 / 3
) -> Float[Tensor, "*out n"]:
    """Sparse top-k mask with p-norm regularisation: `clip(s / temperature - t, 0, 1)^(1 / (p - 1))`, sum k.

    The map of `entmax` with alpha = p and its temperature divided by p - 1; p = 2 is `sparsemax`.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a = m^(2 - p) / (p - 1) where 0 < m < 1, else 0.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; the lambda of the source.
        p: In (1, 2]; the source's default is 4/3.

    Returns:
        The mask `(..., n)` in [0, 1], sum k, sparse; at p = 4/3 smooth where an entry reaches 0, with a kink
        where it reaches 1.

    Raises:
        ValueError: k, temperature or p out of range.

    Cost: one top-(k+1), then 4 to 10 passes over the scores.

    Source: Sander, Puigcerver, Djolonga, Peyre & Blondel 2023, "Fast, Differentiable and Sparse Top-k: a
    Convex Analysis Perspective". Differs: Newton steps for the threshold, where the source pools
    adjacent violators after a sort, or runs Dykstra's projections.
    """
    if not 1 < p <= 2:
        raise ValueError(f"p must be in (1, 2], got {p}")
    return threshold(scores, k, temperature, _power(p))


@operator(
    family=FAMILY,
    cost=COST,
    source="Martins & Kreutzer 2017; Ainslie et al. 2023 (CoLT5)",
    checked="active set; colt5-attention",
)
def csoftmax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Constrained softmax: `min(1, exp(s / temperature - t))` with sum k; at k = 1 exactly softmax.

    Solves `max_m <m, s> - temperature * sum(m log m)` subject to `0 <= m <= 1, sum m = k`. What is taken for
    certain is exactly 1, and no gradient reaches it; below that it is a softmax.

    VJP: `a (g - <a, g> / <a, 1>) / temperature`, a = m where m < 1, else 0.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1], sum k.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1), then 3 to 10 passes over the scores.

    Source: Martins & Kreutzer 2017, "Learning What's Easy: Fully Differentiable Neural Easy-First Taggers",
    with cap 1 and sum k. It is the fixed point of the coordinate descent in Ainslie et al. 2023,
    "CoLT5", whose 20 to 50 iterations stop short of it. Differs: exact, by Newton steps.
    """
    return threshold(scores, k, temperature, Exponential())
