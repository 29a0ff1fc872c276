"""Relaxed sorting networks: comparators exchange by a share; the selection is k rows of their product.

    c = F((a - b) / temperature),    min = (1 - c) a + c b,    max = c a + (1 - c) b

The permutation matrix is the product of the layers; only its last k rows, or their sum, are built
(`_network.py`). What a score gets depends on the wire that it starts on: these operators do not commute with
permutations of the scores, and equal scores may get different entries.
"""

from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, largest, operator
from topkbench.operators._network import Job
from topkbench.operators._network_grad import run
from topkbench.operators._steps import step_named


def relaxed(
    scores: Tensor,
    k: int | Tensor,
    temperature: Temperature,
    network: str,
    options: tuple[str, float, int | None],
    *,
    rows: bool,
) -> Tensor:
    """What these operators share: the rows, or the mask, of a relaxed network.

    Args:
        scores: As the operators'.
        k: Likewise.
        temperature: Likewise.
        network: Its name.
        options: Their step, art and keep.
        rows: Whether to give the rows `(..., k, n)` or the mask `(..., n)`.
    """
    name, art, keep = options
    step, n, most = step_named(name, art), scores.shape[-1], largest(k, scores.shape[-1])
    if keep is not None and isinstance(k, int) and keep < k:
        raise ValueError(f"keep must be at least k = {k}, got {keep}")
    index = None
    if keep is not None:
        scores, index = scores.topk(min(keep, n), dim=-1)
    # A common shift changes nothing, and large scores keep their digits.
    centre = scores.detach().amax(-1, keepdim=True)
    left = scores.shape[-1]
    job = Job(network, left, min(most, left), name, art, rows)
    part = run(step.scaled(scores - centre, temperature), k, job)
    if index is None:
        return part
    index = index.unsqueeze(-2).expand(part.shape) if rows else index
    return part.new_zeros(*part.shape[:-1], n).scatter(-1, index, part)


def _odd_even_mask(
    scores: Tensor,
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    step: str = "logistic",
    art: float = 0.25,
    keep: int | None = None,
) -> Tensor:
    return relaxed(scores, k, temperature, "odd_even", (step, art, keep), rows=False)


def _bitonic_mask(
    scores: Tensor,
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    step: str = "logistic",
    art: float = 0.25,
    keep: int | None = None,
) -> Tensor:
    return relaxed(scores, k, temperature, "bitonic", (step, art, keep), rows=False)


@operator(
    has_rows=True,
    streamed=_odd_even_mask,
    family="sorting network",
    cost="n^2; memory n^2",
    source="Petersen et al. 2021",
    checked="layer matrices; diffsort",
    monotone=False,
    uniform_limit=False,
    infinite=False,
    equivariant=False,
    ties=False,
)
def odd_even(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    step: str = "logistic",
    art: float = 0.25,
    keep: int | None = None,
) -> Float[Tensor, "*rows k n"]:
    """Odd-even transposition sort, relaxed: n layers of comparators of neighbours.

    VJP, from G = dL/dP, h = 0 and the last comparator to the first, P_a and P_b the rows on its wires before:
    `d = <G_max - G_min, P_a - P_b> + (h_max - h_min)(a - b)`, `G_a = c G_max + (1 - c) G_min`, `G_b = c G_min
    + (1 - c) G_max`, h likewise; then `d dc/da` is added to h_a and taken off h_b. What remains is h.

    Args:
        scores: `(..., n)`, floating point; score i starts on wire i.
        k: How many to take, in [1, n]; of the mask also a tensor, for each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; 1 / steepness in the source.
        step: F, how a comparator exchanges: "logistic", "logistic_phi" (the logistic of `d |d|^-art /
            temperature`), "gaussian", "reciprocal" `v / (4 + 2 |v|) + 1/2`, "cauchy", or "optimal"; the last
            three make a comparator's outputs monotone in its inputs.
        art: The power of "logistic_phi", in [0, 1); no other step has it.
        keep: If given, the `keep` largest scores alone are sorted, the largest on wire 0; the others
            get exactly 0.

    Returns:
        The selection `(..., k, n)`: k rows of a doubly stochastic matrix. The mask sums to k and lies in
        [0, 1], but a larger score may get a smaller entry.

    Raises:
        ValueError: k, temperature, step, art or keep out of range, or what is kept for the backward pass is
            too large.

    Cost: the mask takes O(n^2) time and keeps O(n^2) numbers for the backward pass, k rows k times as much.

    Source: Petersen, Borgelt, Kuehne & Deussen 2021, "Differentiable Sorting Networks for Scalable Sorting
    and Ranking Supervision", and their diffsort; 2022, "Monotonic Differentiable Sorting Networks", for the
    last three steps; 2022, "Differentiable Top-k Classification Learning", for keep. Differs: row 1 is the
    largest; the n x n matrix is not built; keep knows no label that is sorted whatever its score.
    """
    return relaxed(scores, k, temperature, "odd_even", (step, art, keep), rows=True)


@operator(
    has_rows=True,
    streamed=_bitonic_mask,
    family="sorting network",
    cost="n log^2 n; memory n log^2 n",
    source="Petersen et al. 2021",
    checked="layer matrices; diffsort",
    monotone=False,
    uniform_limit=False,
    infinite=False,
    equivariant=False,
    ties=False,
)
def bitonic(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    step: str = "logistic",
    art: float = 0.25,
    keep: int | None = None,
) -> Float[Tensor, "*rows k n"]:
    """Bitonic sort, relaxed: log2 n (log2 n + 1) / 2 layers, n rounded up to a power of two.

    With `step="logistic_phi", art=0.5, keep=16` it is what Petersen et al. 2022 (top-k) train ImageNet with.

    VJP: as that of `odd_even`.

    Args:
        scores: `(..., n)`, floating point; score i starts on wire i.
        k: How many to take, in [1, n]; of the mask also a tensor, for each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; 1 / steepness in the source.
        step: F, how a comparator exchanges: "logistic", "logistic_phi" (the logistic of `d |d|^-art /
            temperature`), "gaussian", "reciprocal" `v / (4 + 2 |v|) + 1/2`, "cauchy", or "optimal"; the last
            three make a comparator's outputs monotone in its inputs.
        art: The power of "logistic_phi", in [0, 1); no other step has it.
        keep: If given, the `keep` largest scores alone are sorted, the largest on wire 0; the others
            get exactly 0.

    Returns:
        The selection `(..., k, n)`: k rows of a doubly stochastic matrix. The mask sums to k and lies in
        [0, 1], but a larger score may get a smaller entry.

    Raises:
        ValueError: k, temperature, step, art or keep out of range, or what is kept for the backward pass is
            too large.

    Cost: the mask takes O(n log^2 n) time and keeps as many numbers for the backward pass, k rows k times
    as much.

    Source: as `odd_even`. Differs: as there; where n is no power of two, comparators without a second score
    do nothing, as in the published code (not in the paper).
    """
    return relaxed(scores, k, temperature, "bitonic", (step, art, keep), rows=True)
