"""The relaxed splitter selection network: comparators that bring up the k largest and do not sort the rest.

Which wires meet: `_splitter.py`. As of `networks`, what a score gets depends on the wire that it starts on.
"""

from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator
from topkbench.operators.networks import relaxed


def _splitter_mask(
    scores: Tensor,
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    step: str = "logistic",
    art: float = 0.25,
    keep: int | None = None,
) -> Tensor:
    return relaxed(scores, k, temperature, "splitter", (step, art, keep), rows=False)


@operator(
    has_rows=True,
    streamed=_splitter_mask,
    family="sorting network",
    cost="n log n and more with k; memory as much",
    source="Petersen et al. 2022",
    checked="layer matrices; difftopk",
    monotone=False,
    uniform_limit=False,
    infinite=False,
    equivariant=False,
    ties=False,
)
def splitter(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    step: str = "logistic",
    art: float = 0.25,
    keep: int | None = None,
) -> Float[Tensor, "*rows k n"]:
    """Splitter selection network, relaxed: a cascade over all, then over those that tie in their least rank.

    Fewer comparators than it takes to sort: the first cascade has n log2(n) / 2 of them and settles the
    largest; only wires that may still hold one of the k largest go on. For n = 16 and k = 5 that is 50
    comparators, and 80 in the bitonic network. Row j does not depend on k.

    VJP: as that of `odd_even`, comparator by comparator backwards.

    Args:
        scores: `(..., n)`, floating point; score i starts on wire i.
        k: How many to take, in [1, n]; of the mask also a tensor, for each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; 1 / steepness in the source.
        step: F, how a comparator exchanges: as of `odd_even`.
        art: The power of "logistic_phi", in [0, 1); no other step has it.
        keep: If given, the `keep` largest scores alone go through the network, the largest on wire 0; the
            others get exactly 0.

    Returns:
        The selection `(..., k, n)`: k rows of a doubly stochastic matrix. The mask sums to k and lies in
        [0, 1], but a larger score may get a smaller entry.

    Raises:
        ValueError: k, temperature, step, art or keep out of range, or what is kept for the backward pass is
            too large.

    Cost: time and memory in proportion to the number of comparators, k rows k times as much. Which wires
    meet is worked out once for each n and k. `torch.compile` breaks its graph here and runs it as it is.

    Source: Petersen, Kuehne, Borgelt & Deussen 2022, "Differentiable Top-k Classification Learning",
    and their difftopk. Differs: row 1 is the largest; no n x n matrix is built; keep knows no
    label that is sorted whatever its score.
    """
    return relaxed(scores, k, temperature, "splitter", (step, art, keep), rows=True)
