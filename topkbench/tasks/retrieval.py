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
from topkbench.tasks import _retrieval_digits
from topkbench.tasks._contract import Batch, Teacher, entries, scores_of
from topkbench.tasks._split import Split, check_split

START = 0.5  # a row of W starts with a norm of about this
AT_ONCE = 128  # rows of a held-out batch
SHARP = 10.0  # what the cross-entropy multiplies cosines with
Objective = Literal["recall", "cross_entropy"]
Data = Literal["planted", "digits"]


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

    With the data "digits", x and c_j are scikit-learn's 8 x 8 digits, pixels in [0, 1]; q_j is the cosine of
    W x and W c_j; and relevant is what is of the same class, n / 10 candidates. These are training rows, as
    many of each class; training queries are the other training rows, drawn with replacement, and held-out
    ones the held-out rows (540, however many are asked for). The cross-entropy is of 10 q. At n = 400, k = 10
    (Adam at 0.01, 400 steps of 64 queries) recall was 0.95 with the entropic relaxation at temperature 0.1,
    0.90 at 1, 0.94 with the cross-entropy, 0.28 with plain straight-through, 0.56 with the hard gradient,
    where all start, and without a W 0.87.

    Metrics, on held-out queries with the hard top-k, all in [0, 1]: `recall` and `ndcg` at k, binary
    relevance, higher is better, recall with min(k, relevant) as the whole; `recall_raw`, the recall without a
    W, from x and c_j themselves; and where a W* is planted, `distance`, `|a W^T W - W*^T W*| / |W*^T W*|` at
    the factor a >= 0 where it is least, lower is better.

    Attributes:
        n: Candidates, >= 2; for digits a multiple of 10, at most 1,210 (840 to tune).
        d: The dimension of queries and candidates, >= 1; 64 for digits.
        k: How many are brought back, in [1, n].
        relevant: How many are relevant, in [1, n]; k if None, where W* is perfect. None for digits.
        embedding: Rows of W, >= 1.
        objective: "recall" or "cross_entropy".
        data: "planted" or "digits".
        split: "evaluation", or "tuning" (for digits): the held-out rows are set aside, and the training rows
            split once more in the same way, with random_state 1: 879 to train on, 378 held out.

    Raises:
        ValueError: one of them out of range.

    Cost: a step takes (n + B) d embedding + B n embedding multiplications and B n numbers a replicate, beside
    the method's, which decides: 1,000 candidates is the usual size and 10,000 the large one. There, on 64
    queries in float32, scores are 2.4 MiB, and a step of `hard` holds 5.2 MiB of tensors beside them at most,
    of `entropic` or `sparsemax` 5.7, in 10 ms; one matrix of all pairs would take 24 GiB, and methods
    that need one refuse (experiments/retrieval_memory.py). With digits, 400 is the usual size: 8 replicates
    take 12 s for 400 steps of `entropic`.

    Source: for the loss, Patel, Tolias & Matas 2022, "Recall@k Surrogate Loss with Large Batches and
    Similarity Mixup"; for NDCG, Jarvelin & Kekalainen 2002, "Cumulated Gain-Based Evaluation of IR
    Techniques". Differs: candidates are planted or digits; any top-k in place of sigmoids of pairwise
    differences. Of digits the whole class of a query is relevant, 40 of a gallery of 400, not a fixed 20.
    """

    n: int = 1000
    d: int = 32
    k: int = 10
    relevant: int | None = None
    embedding: int = 8
    objective: Objective = "recall"
    data: Data = "planted"
    split: Split = "evaluation"
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        for name, size, least in (("n", self.n, 2), ("d", self.d, 1), ("embedding", self.embedding, 1)):
            if size < least:
                raise ValueError(f"{name} must be >= {least}, got {size}")
        for name, choice, allowed in (("objective", self.objective, Objective), ("data", self.data, Data)):
            if choice not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {choice!r}")
        check_split(self.split, self.data == "digits")
        if self.data == "digits":
            _retrieval_digits.check(self.n, self.d, self.split)
            if self.relevant is not None:
                raise ValueError(f"relevant must be null for digits, n / 10 of them, got {self.relevant}")
        for name, size in (("k", self.k), ("relevant", self.count)):
            if not 1 <= size <= self.n:
                raise ValueError(f"{name} must be in [1, n] = [1, {self.n}], got {size}")

    @property
    def count(self) -> int:
        """How many candidates are relevant to a query."""
        if self.data == "digits":
            return self.n // _retrieval_digits.CLASSES
        return self.k if self.relevant is None else self.relevant

    def teacher(self, noise: Noise) -> Teacher:
        """W* and the candidates; for digits the candidates, the queries and their classes."""
        if self.data == "digits":
            return _retrieval_digits.gallery(noise, self.n, self.split)
        W = normalize(noise("W", self.embedding, self.d), dim=-1)
        return {"W": W, "candidates": noise("candidates", self.n, self.d)}

    def start(self, noise: Noise) -> Float[Tensor, "R embedding d"]:
        """Independent normal entries with standard deviation START / sqrt(d)."""
        return noise("W", self.embedding, self.d) * (START / self.d**0.5)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` queries; the target is the places of the relevant: `(R, B, relevant)`.

        Fresh ones or, for digits, training rows and `clean` held-out ones, at most 540.
        """
        if self.data == "digits":
            return self._digits(teacher, noise, rows, clean)
        x = noise("x", rows, self.d)
        given = {"candidates": teacher["candidates"]}
        best = [
            self.scores(teacher["W"], piece).topk(self.count).indices
            for piece in Batch(x, x, teacher, given).pieces(AT_ONCE)
        ]
        return Batch(x, torch.cat(best, 1).to(x.dtype), teacher, given)

    def _digits(self, teacher: Teacher, noise: Noise, rows: int, clean: bool) -> Batch:
        held_out, asked = _retrieval_digits.held_out, _retrieval_digits.asked
        x, label = held_out(teacher, rows, self.split) if clean else asked(teacher, noise, rows)
        places = _retrieval_digits.relevant(label, self.n)
        return Batch(x, places.to(x.dtype), teacher, {"candidates": teacher["candidates"]})

    def scores(self, W: Float[Tensor, "R embedding d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """<W x, W c>, or their cosine."""
        return self._alike(scores_of(W, batch.x), scores_of(W, batch.given["candidates"]))

    def _alike(self, x: Float[Tensor, "R B e"], c: Float[Tensor, "R n e"]) -> Float[Tensor, "R B n"]:
        """Inner products, for digits cosines."""
        if self.data == "digits":
            x, c = normalize(x, dim=-1), normalize(c, dim=-1)
        return x @ c.mT

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """1 - recall@k of the mask, or the cross-entropy of the scores."""
        if self.objective == "recall":
            return 1 - entries(part, batch.target.long()).sum(-1) / min(self.k, self.count)
        logits = SHARP * scores if self.data == "digits" else scores
        entropy = logits.logsumexp(-1) - entries(logits, batch.target.long()).mean(-1)
        return entropy.expand(part.shape[:-1])

    def metrics(self, W: Float[Tensor, "R embedding d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`recall`, `ndcg`, `recall_raw` and, where a W* is planted, `distance`."""
        sums = W.new_zeros(3, len(W))
        for piece in test.pieces(AT_ONCE):
            raw = self._alike(piece.x, piece.given["candidates"])
            scores, places = self.scores(W, piece), piece.target.long()
            columns = (
                recall(scores, places, self.k),
                ndcg(scores, places, self.k),
                recall(raw, places, self.k),
            )
            sums += torch.stack([column.sum(-1) for column in columns])
        found = dict(zip(("recall", "ndcg", "recall_raw"), sums / test.x.shape[1], strict=True))
        if "W" in test.teacher:
            found["distance"] = _distance(W.mT @ W, test.teacher["W"].mT @ test.teacher["W"])
        return found


def recall(
    scores: Float[Tensor, "*rows n"], places: Int[Tensor, "*rows r"], k: int
) -> Float[Tensor, "*rows"]:
    """The share of the relevant, at these places, in the k largest scores: of min(k, r)."""
    return entries(hard_mask(scores, k), places).sum(-1) / min(k, places.shape[-1])


def ndcg(scores: Float[Tensor, "*rows n"], places: Int[Tensor, "*rows r"], k: int) -> Float[Tensor, "*rows"]:
    """Normalised discounted cumulative gain at k, binary relevance: `sum_(rank j relevant) 1 / log2(j + 1)`.

    Divided by what the best ranking has. Equal scores are ranked as `torch.topk` does.
    """
    relevant = torch.zeros_like(scores).scatter(-1, places, 1.0)
    weights = 1 / torch.arange(2, k + 2, dtype=scores.dtype, device=scores.device).log2()
    gains = relevant.gather(-1, scores.topk(k).indices) * weights
    return gains.sum(-1) / weights[: places.shape[-1]].sum()


def _distance(gram: Float[Tensor, "R d d"], target: Float[Tensor, "R d d"]) -> Float[Tensor, " R"]:
    """`|a G - G*| / |G*|` at the factor a >= 0 where it is least."""
    size = gram.square().sum((1, 2), keepdim=True)
    a = (gram * target).sum((1, 2), keepdim=True).clamp(min=0) / size.clamp(min=1e-30)
    return (a * gram - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
