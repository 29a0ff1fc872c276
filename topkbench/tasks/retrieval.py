"""`retrieval`: the share of the relevant candidates among the k that a query brings back."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from topkbench.operators import hard_mask
from topkbench.operators._contract import Part
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher, scores_of

START = 0.5  # a row of W starts with a norm of about this
AT_ONCE = 128  # rows of a held-out batch
Objective = Literal["recall", "cross_entropy"]


@dataclass(frozen=True)
class Retrieval:
    """q_j = <W x, W c_j>; the loss is 1 - sum_(j relevant) m_j(q) / min(k, relevant).

    x ~ N(0, I_d) is a query and c_1 ... c_n ~ N(0, I_d) are the candidates, the same for all queries of a
    replicate, in training and held out. W `(R, embedding, d)` maps both to a space where what belongs
    together has a large inner product. Relevant are the `relevant` candidates that a planted W* ranks
    highest; its rows are random unit vectors. The ranking depends on W^T W alone, and not on its scale.

    The loss of the hard mask is 1 - recall@k. W acts through the choice alone, so that the hard gradient is
    0. As the loss is linear in the mask, it tells what each candidate would be worth, and no more: +1 for a
    relevant one, 0 for another.

    The baseline without top-k is the objective "cross_entropy", to train with any method (`hard` is the
    cheapest): `-mean_(j relevant) log softmax(q)_j`, which does not look at the mask. At n = 1,000, d = 32, k
    = 10 (Adam at 0.01, 1,000 steps of 32 queries) its recall was 0.83, that of the entropic relaxation at
    temperatures 0.1, 1 and 3 0.93, 0.96 and 0.97, of plain straight-through 0.28, of the hard gradient
    0.04 and without a W 0.11.

    Metrics, on held-out queries with the hard top-k, all in [0, 1]: `recall` and `ndcg` at k, binary
    relevance, higher is better; `recall_raw`, the recall without a W, from the scores <x, c_j>; and
    `distance`, `|a W^T W - W*^T W*| / |W*^T W*|` at the factor a >= 0 where it is least, lower is better.

    Attributes:
        n: Candidates, >= 2.
        d: The dimension of queries and candidates, >= 1.
        k: How many are brought back, in [1, n].
        relevant: How many are relevant, in [1, n]; k if None, where W* is perfect.
        embedding: Rows of W, >= 1.
        objective: "recall" or "cross_entropy".

    Raises:
        ValueError: one of them out of range.

    Cost: a step takes (n + B) d embedding + B n embedding multiplications and B n numbers a replicate, beside
    the method's, which decides: 1,000 candidates is the usual size and 10,000 the large one. There, on 64
    queries in float32, scores are 2.4 MiB, and a forward and backward pass of `entropic` or `sparsemax`
    takes 11 to 12 MiB more; an operator that compares all pairs would take 24 GiB.

    Source: for the loss, Patel, Tolias & Matas 2022, "Recall@k Surrogate Loss with Large Batches and
    Similarity Mixup"; for NDCG, Jarvelin & Kekalainen 2002, "Cumulated Gain-Based Evaluation of IR
    Techniques". Differs: planted candidates, and any top-k in place of sigmoids of pairwise differences.
    """

    n: int = 1000
    d: int = 32
    k: int = 10
    relevant: int | None = None
    embedding: int = 8
    objective: Objective = "recall"
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        for name, size, least in (("n", self.n, 2), ("d", self.d, 1), ("embedding", self.embedding, 1)):
            if size < least:
                raise ValueError(f"{name} must be >= {least}, got {size}")
        for name, size in (("k", self.k), ("relevant", self.count)):
            if not 1 <= size <= self.n:
                raise ValueError(f"{name} must be in [1, n] = [1, {self.n}], got {size}")
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"objective must be one of {', '.join(get_args(Objective))}, got {self.objective!r}"
            )

    @property
    def count(self) -> int:
        """How many candidates are relevant to a query."""
        return self.k if self.relevant is None else self.relevant

    def teacher(self, noise: Noise) -> Teacher:
        """W* and the candidates."""
        W = normalize(noise("W", self.embedding, self.d), dim=-1)
        return {"W": W, "candidates": noise("candidates", self.n, self.d)}

    def start(self, noise: Noise) -> Float[Tensor, "R embedding d"]:
        """Independent normal entries with standard deviation START / sqrt(d)."""
        return noise("W", self.embedding, self.d) * (START / self.d**0.5)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:  # noqa: ARG002
        """`rows` fresh queries; the target is the places of the relevant, best first: `(R, B, relevant)`."""
        x = noise("x", rows, self.d)
        given = {"candidates": teacher["candidates"]}
        best = [
            self.scores(teacher["W"], piece).topk(self.count).indices
            for piece in Batch(x, x, teacher, given).pieces(AT_ONCE)
        ]
        return Batch(x, torch.cat(best, 1).to(x.dtype), teacher, given)

    def scores(self, W: Float[Tensor, "R embedding d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """<W x, W c>."""
        return scores_of(W, batch.x) @ scores_of(W, batch.given["candidates"]).mT

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """1 - recall@k of the mask, or the cross-entropy of the scores."""
        if self.objective == "recall":
            return 1 - _at(part, batch.target.long()).sum(-1) / min(self.k, self.count)
        entropy = scores.logsumexp(-1) - _at(scores, batch.target.long()).mean(-1)
        return entropy.expand(part.shape[:-1])

    def metrics(self, W: Float[Tensor, "R embedding d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`recall`, `ndcg`, `recall_raw` and `distance`."""
        sums = W.new_zeros(3, len(W))
        for piece in test.pieces(AT_ONCE):
            raw = piece.x @ piece.given["candidates"].mT
            scores, places = self.scores(W, piece), piece.target.long()
            columns = (
                recall(scores, places, self.k),
                ndcg(scores, places, self.k),
                recall(raw, places, self.k),
            )
            sums += torch.stack([column.sum(-1) for column in columns])
        means = sums / test.x.shape[1]
        distance = _distance(W.mT @ W, test.teacher["W"].mT @ test.teacher["W"])
        return {**dict(zip(("recall", "ndcg", "recall_raw"), means, strict=True)), "distance": distance}


def recall(
    scores: Float[Tensor, "*rows n"], places: Int[Tensor, "*rows r"], k: int
) -> Float[Tensor, "*rows"]:
    """The share of the relevant, at these places, in the k largest scores: of min(k, r)."""
    return _at(hard_mask(scores, k), places).sum(-1) / min(k, places.shape[-1])


def ndcg(scores: Float[Tensor, "*rows n"], places: Int[Tensor, "*rows r"], k: int) -> Float[Tensor, "*rows"]:
    """Normalised discounted cumulative gain at k, binary relevance: `sum_(rank j relevant) 1 / log2(j + 1)`.

    Divided by what the best ranking has. Equal scores are ranked as `torch.topk` does.
    """
    relevant = torch.zeros_like(scores).scatter(-1, places, 1.0)
    weights = 1 / torch.arange(2, k + 2, dtype=scores.dtype, device=scores.device).log2()
    gains = relevant.gather(-1, scores.topk(k).indices) * weights
    return gains.sum(-1) / weights[: places.shape[-1]].sum()


def _at(part: Float[Tensor, "*part"], places: Int[Tensor, "*rows r"]) -> Tensor:
    """The entries at these places; samples in front of the part."""
    return part.gather(-1, places.expand(*part.shape[:-1], places.shape[-1]))


def _distance(gram: Float[Tensor, "R d d"], target: Float[Tensor, "R d d"]) -> Float[Tensor, " R"]:
    """`|a G - G*| / |G*|` at the factor a >= 0 where it is least."""
    size = gram.square().sum((1, 2), keepdim=True)
    a = (gram * target).sum((1, 2), keepdim=True).clamp(min=0) / size.clamp(min=1e-30)
    return (a * gram - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
