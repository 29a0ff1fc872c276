"""`router`: which k of n known experts answer, a mixture of experts with a planted router."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators import hard_mask
from topkbench.operators._contract import Part
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher, check_counts, scores_of
from topkbench.tasks.planted import (
    AT_ONCE,
    START,
    NormalInputs,
    half_squared_error,
    recall,
)

Gate = Literal["uniform", "soft"]
HIGHEST = 30.0  # what is not kept may score more than all that is: its exponential stays finite


@dataclass(frozen=True)
class Router(NormalInputs):
    """y = sum_i g_i e_i(x) over the k experts that a linear router chooses; the loss is (y - y*)^2 / 2.

        x   ~ N(0, I_d)
        e_i = tanh(<a_i, x>), i = 1 ... n, with a_i ~ N(0, I_d) planted and known to the learner
        q   = W x, m its top-k mask; rows of W* uniform on the unit sphere: a score W* x has variance 1
        g_i = m_i / k                                    gate "uniform"
        g_i = m_i exp(q_i) / sum_j m_j exp(q_j)          gate "soft": softmax over what is kept
        y*  = the same with W* and its hard mask

    W alone is learned, and the experts it names are fixed: row i of W is expert i, in the learner as in the
    teacher. So what is chosen is compared as it is; no permutation of the experts has to be found.

    The loss is a number for n unknown choices: unlike `gate` it does not say which of them was wrong.
    With the uniform gate W acts through the choice alone and the hard gradient is exactly 0. With the soft
    one a kept expert's share has a derivative, but a change of experts makes the loss jump, and of that the
    hard gradient knows nothing. The mean loss is smooth in W either way; its true gradient is the
    hard one plus the boundary flux (`methods.Oracle`), and W* has loss 0.

    A relaxed mask evaluates all n experts, a hard one k. `+method=scaled_softmax` on the uniform gate is the
    dense mixture of all experts under a softmax router, the baseline without top-k: see its relaxed_loss.

    With `balance` > 0 the training loss of a row has in addition, so that experts are used alike,

        balance * n * sum_i f_i p_i,   p = softmax(q), f_i expert i's share of the batch's choices

    with f held constant and from the hard top-k of the scores, whatever the method does: it is the same for
    all of them, and 1 (times `balance`) when loads are equal. Held-out losses are without it. It couples the
    rows of a batch, so that there is no true gradient then: `Oracle` is refused as it begins.

    Metrics, on held-out rows with the hard top-k: `recall`, the share of the teacher's experts that are
    chosen, in [0, 1], 1 at W*, k/n by chance. `load_cv`, the standard deviation of the experts' loads over
    their mean, in [0, sqrt(n/k - 1)]: 0 when all are used alike, at W* as unequal as the teacher
    itself. `dead`, the share of experts that no row chooses, in [0, 1 - k/n].

    Attributes:
        n: How many experts there are.
        d: The dimension of x.
        k: How many answer, in [1, n].
        gate: "uniform" or "soft".
        balance: The weight of the load-balancing loss, >= 0.

    Raises:
        ValueError: one of them out of range, or a gate that is not one of the two.

    Cost: 2 n d a row for scores and experts, as much as two `gate` tasks. At n = 64, d = 32, k = 8 and
    batches of 32, 8 replicates take 1.7 s for 1000 steps of `entropic` on one core; at n = 1,000, d = 64,
    k = 10, 0.6 s of processor time for 50.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
    Layer", eqs. (1) to (5), for the soft gate; Fedus, Zoph & Shazeer 2022, "Switch Transformers", eqs. (4) to
    (6), for the balance. Differs: experts are planted and known; f over k choices instead of one.
    """

    n: int
    d: int
    k: int
    gate: Gate = "uniform"
    balance: float = 0.0
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        check_counts(self.n, self.k, d=self.d)
        if self.gate not in get_args(Gate):
            raise ValueError(f"gate must be one of {', '.join(get_args(Gate))}, got {self.gate}")
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"balance must be >= 0 and finite, got {self.balance}")

    def teacher(self, noise: Noise) -> Teacher:
        """W* `(R, n, d)` and the experts' directions a `(R, n, d)`."""
        W = torch.nn.functional.normalize(noise("W", self.n, self.d), dim=-1)
        return {"W": W, "a": noise("a", self.n, self.d)}

    def start(self, noise: Noise) -> Float[Tensor, "R n d"]:
        """Independent normal entries with standard deviation START / sqrt(d)."""
        return noise("W", self.n, self.d) * (START / self.d**0.5)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` fresh rows; `clean` ones are without the balance."""
        x = noise("x", rows, self.d)
        weighs = bool(self.balance) and not clean
        given = {"balance": x.new_full((len(x), 1), self.balance)} if weighs else {}
        return Batch(x, self._target(x, teacher), teacher, given)

    def scores(self, W: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """W x."""
        return scores_of(W, batch.x)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """Half the squared error of the mixture, and the balance where the batch has one."""
        error = half_squared_error(self._mixture(part, scores, batch.x, batch.teacher), batch.target)
        if "balance" in batch.given:
            return error + batch.given["balance"] * imbalance(scores, self.k)
        return error

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a row depends on the others, as with a balance: there is no true gradient."""
        return self.balance > 0

    def moved(self, batch: Batch, rows: Tensor, x: Float[Tensor, "R T d"]) -> Batch:  # noqa: ARG002
        """Any rows at other x: a row carries nothing else.

        Raises:
            ValueError: with a balance the loss of a row depends on the others.
        """
        if self.balance:
            raise ValueError(f"Router has no true gradient with balance > 0, got {self.balance}")
        return dataclasses.replace(batch, x=x, target=self._target(x, batch.teacher))

    def metrics(self, W: Float[Tensor, "R n d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`recall`, `load_cv` and `dead`."""
        found, chosen = [], W.new_zeros(W.shape[:2])
        for piece in test.pieces(AT_ONCE):
            found.append(recall(self.k, W, piece))
            chosen += hard_mask(self.scores(W, piece), self.k).sum(-2)
        return {
            "recall": torch.cat(found, dim=-1).mean(-1),
            "load_cv": chosen.std(-1, correction=0) / chosen.mean(-1),
            "dead": (chosen == 0).to(W.dtype).mean(-1),
        }

    def _target(self, x: Float[Tensor, "R B d"], teacher: Teacher) -> Float[Tensor, "R B 1"]:
        scores = scores_of(teacher["W"], x)
        return self._mixture(hard_mask(scores, self.k), scores, x, teacher)

    def _mixture(self, part: Tensor, scores: Tensor, x: Tensor, teacher: Teacher) -> Tensor:
        """What the experts answer together, `(*s, R, B, 1)`."""
        share = part / self.k if self.gate == "uniform" else softmax_over_kept(part, scores)
        return (share * scores_of(teacher["a"], x).tanh()).sum(-1, keepdim=True)


def softmax_over_kept(part: Tensor, scores: Float[Tensor, "R B n"]) -> Tensor:
    """`m_i exp(q_i) / sum_j m_j exp(q_j)` for a mask `(*s, R, B, n)`, hard or relaxed: sum 1.

    All 0 where nothing is kept, as a random subset of no fixed size may have it.
    """
    top = scores.detach().masked_fill(part.detach() <= 0, -torch.inf).amax(-1, keepdim=True)
    weight = part * (scores - top.masked_fill(top == -torch.inf, 0)).clamp(max=HIGHEST).exp()
    total = weight.sum(-1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1)


def imbalance(scores: Float[Tensor, "R B n"], k: int) -> Float[Tensor, "R B"]:
    """`n sum_i f_i p_i` per row: 1 in the mean where loads are equal, n/k where all choose the same k."""
    load = hard_mask(scores, k).mean(-2, keepdim=True).detach() / k
    return scores.shape[-1] * (load * scores.softmax(-1)).sum(-1)
