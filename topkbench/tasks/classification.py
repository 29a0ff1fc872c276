"""`classification`: is the label among the k classes with the largest scores?"""

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.losses import smooth_topk_svm
from topkbench.operators._contract import Part
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher, check_counts, entries, scores_of
from topkbench.tasks._digits_binary import PIXELS, first, halves, labels
from topkbench.tasks._split import Split, again, check_split

CLASSES = 10  # of digits
START = 0.5  # the standard deviation of a first score
FLOOR = 1e-6  # the least part of a label that a logarithm is taken of
MOST = 5  # top-1 to top-5
AT_ONCE = 128  # rows of a held-out batch
Data = Literal["digits", "synthetic"]
Objective = Literal["mask", "error", "cross_entropy", "smooth_svm", "hinge"]


@dataclass(frozen=True)
class Classification:
    """q = W A x + b, one score a class; y the label, m the top-k mask of q: the loss is -log m_y.

    The class matrix W `(R, n, bottleneck)` ranks a code A x of few numbers, so that top-1 cannot be had for
    all rows and it matters which k is asked for; A `(R, bottleneck, d)` and b `(R, n)` are learned beside it.

    - digits: scikit-learn's 1,797 digits, pixels less their mean in training and over one number; 70 % to
      train on, drawn with replacement, and the others held out (540, however many rows are asked for).
    - synthetic: x ~ N(0, I_d), y the nearest of n centres c_i ~ N(0, I) to A* x, A* with random orthonormal
      rows. W* = c, b*_i = -|c_i|^2 / 2 and A* are perfect. Every row is new.

    A share `label_noise` of the training labels is replaced by ones uniform on all n classes: 1/n of these
    are as before. With digits it is drawn once for a replicate. Held-out labels are clean.

    What is minimised, the `objective`:

    - mask: -log m_y, and below FLOOR its tangent there: see `surprise`. For the hard mask it is 0 or a
      constant (14.8), so that the hard gradient is exactly 0, in W, A and b.
    - error: 1 - m_y, for the hard mask the top-k error itself; the hard gradient is 0 as well. It is
      bounded, so that rows with a wrong label weigh less, and linear in the mask, so that straight-through
      has the gradient of its relaxation.
    - cross_entropy: `-log softmax(q)_y`, the baseline without top-k.
    - smooth_svm: `losses.smooth_topk_svm`; hinge: its limit, `max(0, 1 + (q_[k] of the others - q_y) / k)`.

    The last three are functions of the scores: any method trains them alike, `hard` is the cheapest.
    `+method=scaled_softmax` with "mask" is the cross-entropy less log k (where k softmax(q)_y > FLOOR).

    The floor's tangent is what straight-through lives on: cut off flat, a wrong row would have no gradient.

    After 800 steps (Adam at 0.02, batches of 32, 8 replicates), top-k accuracy on digits at k = 2, digits
    with label_noise 0.4, and synthetic with n = 100, d = 32, k = 5 and label_noise 0 and 0.4:

                            k = 2   and noise   k = 5   and noise
        lapsum, mask        0.904   0.721       0.919   0.440
        ste_lapsum, mask    0.882   0.752       0.802   0.711
        lapsum, error       0.871   0.841       0.561   0.508
        cross_entropy       0.886   0.730       0.857   0.503
        smooth_svm          0.892   0.724       0.725   0.474
        hinge               0.885   0.440       0.449   0.120

    Nothing is tuned. The last three depend on no method, the plain hard gradient stays at 0.171 and 0.043.

    Metrics, on held-out rows with clean labels: `top_1` to `top_5`, or to n where that is less: the share of
    rows whose label is among so many largest scores, in [0, 1], higher is better; 1/n, 2/n, ... by chance.

    Attributes:
        n: Classes, >= 1; 10 for digits.
        d: The dimension of x; 64 for digits.
        k: In [1, n].
        data: "digits" or "synthetic".
        label_noise: The share of the training labels that is replaced, in [0, 1).
        bottleneck: The dimension of the code, in [1, d].
        objective: "mask", "error", "cross_entropy", "smooth_svm" or "hinge".
        temperature: Of "smooth_svm", > 0.
        split: "evaluation", or "tuning" (for digits): the held-out rows are set aside, and the training rows
            split once more in the same way, with random_state 1: 879 to train on, 378 held out.

    Raises:
        ValueError: one of them out of range.

    Cost: a step takes 2 B (d + n) bottleneck multiplications a replicate beside the method's, smooth_svm
    O(B n k) more. 2,000 steps of `lapsum` for 8 replicates on digits take 4 s on one core. n = 1,000 with a
    bottleneck of 8 is the large size: 50 steps (synthetic, d = 64, k = 5, batches of 32) take 0.2 s of
    processor time.

    Source: Petersen, Kuehne, Borgelt & Deussen 2022, "Differentiable Top-k Classification Learning", for
    -log m_y; Berrada, Zisserman & Kumar 2018, "Smooth Loss Functions for Deep Top-k Classification", for
    the hinge and noise on labels. Differs: one k, not a distribution P_K over several; all classes, not the
    m best; a tangent, where the published code adds 1e-7; a linear model of a narrow code.
    """

    n: int = CLASSES
    d: int = PIXELS
    k: int = 2
    data: Data = "digits"
    label_noise: float = 0.0
    bottleneck: int = 2
    objective: Objective = "mask"
    temperature: float = 1.0
    split: Split = "evaluation"
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        check_counts(self.n, self.k, d=self.d, bottleneck=self.bottleneck)
        for name, value, allowed in (
            ("data", self.data, get_args(Data)),
            ("objective", self.objective, get_args(Objective)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.data == "digits" and (self.n, self.d) != (CLASSES, PIXELS):
            raise ValueError(f"digits have n = {CLASSES} and d = {PIXELS}, got n = {self.n} and d = {self.d}")
        if self.bottleneck > self.d:
            raise ValueError(f"bottleneck must be in [1, d] = [1, {self.d}], got {self.bottleneck}")
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"label_noise must be in [0, 1), got {self.label_noise}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature}")
        check_split(self.split, self.data == "digits")

    def teacher(self, noise: Noise) -> Teacher:
        """The training labels of digits, noise included `(R, T)`; or A*, the centres, and b*."""
        if self.data == "digits":
            like = noise("like")
            own = labels(like.device, self.split)[0].to(like.dtype)
            return {"labels": self._spoiled(own.expand(len(like), -1), noise)}
        A = torch.linalg.qr(noise("A", self.d, self.bottleneck)).Q.mT
        centres = noise("centres", self.n, self.bottleneck)
        return {"A": A, "centres": centres, "b": -centres.square().sum(-1) / 2}

    def start(self, noise: Noise) -> Float[Tensor, "R n bottleneck"]:
        """Independent normal entries with standard deviation START / sqrt(bottleneck)."""
        return noise("W", self.n, self.bottleneck) * (START / self.bottleneck**0.5)

    def others(
        self,
        teacher: Teacher,  # noqa: ARG002
        noise: Noise,
        W: Float[Tensor, "R n bottleneck"],
    ) -> dict[str, Tensor]:
        """A: independent normal entries with standard deviation 1 / sqrt(d); b: 0."""
        return {"A": noise("A", self.bottleneck, self.d) / self.d**0.5, "b": torch.zeros_like(W[..., 0])}

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` rows, drawn with replacement for digits; `clean` ones are held out, at most 540 of those."""
        if self.data == "digits":
            x, label = self._digits(teacher["labels"], noise, rows, clean)
        else:
            x = noise("x", rows, self.d)
            label = _planted_scores(x, teacher).argmax(-1).to(x.dtype)
            label = label if clean else self._spoiled(label, noise)
        return Batch(x, label.unsqueeze(-1), teacher)

    def _digits(
        self, told: Float[Tensor, "R T"], noise: Noise, rows: int, clean: bool
    ) -> tuple[Tensor, Tensor]:
        train, held_out = _pixels(told.dtype, told.device, self.split)
        if clean:
            own = labels(told.device, self.split)[1].to(told.dtype)
            return first(held_out, rows, len(told)), own[:rows].expand(len(told), -1)
        places = again(noise, rows, len(train))
        return train[places], told.gather(-1, places)

    def _spoiled(self, label: Float[Tensor, "R B"], noise: Noise) -> Float[Tensor, "R B"]:
        """The labels, a share of them replaced by uniformly random ones."""
        rows = label.shape[-1]
        replaced = noise("replaced", rows, law="uniform") < self.label_noise
        other = (noise("label", rows, law="uniform") * self.n).floor().clamp(max=self.n - 1)
        return torch.where(replaced, other, label)

    def scores(self, W: Float[Tensor, "R n bottleneck"], batch: Batch) -> Float[Tensor, "R B n"]:
        """W A x + b."""
        code = scores_of(batch.learned["A"], batch.x)
        return scores_of(W, code) + batch.learned["b"].unsqueeze(-2)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """The objective; only "mask" and "error" look at the mask."""
        label = batch.target.long()
        if self.objective == "mask":
            return surprise(_at(part, label))
        if self.objective == "error":
            return 1 - _at(part, label)
        return self._of_scores(scores, label.squeeze(-1)).expand(part.shape[:-1])

    def _of_scores(self, scores: Float[Tensor, "R B n"], label: Int[Tensor, "R B"]) -> Float[Tensor, "R B"]:
        """The losses of label and scores alone."""
        if self.objective == "smooth_svm":
            return smooth_topk_svm(scores, label, self.k, self.temperature)
        own = _at(scores, label.unsqueeze(-1))
        if self.objective == "cross_entropy":
            return scores.logsumexp(-1) - own
        others = scores.scatter(-1, label.unsqueeze(-1), -torch.inf)
        return (1 + (others.topk(self.k).values[..., -1] - own) / self.k).clamp(min=0)

    def metrics(self, W: Float[Tensor, "R n bottleneck"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`top_1` to `top_5`."""
        hits = torch.cat([_hits(self.scores(W, piece), piece.target) for piece in test.pieces(AT_ONCE)], 1)
        return {f"top_{j + 1}": column for j, column in enumerate(hits.mean(1).unbind(-1))}


def surprise(part: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """-log of a part; below FLOOR its tangent there, so that it is finite and never flat."""
    return (FLOOR - part).clamp(min=0) / FLOOR - part.clamp(min=FLOOR).log()


def _planted_scores(x: Float[Tensor, "R B d"], teacher: Teacher) -> Float[Tensor, "R B n"]:
    """|A* x|^2 / 2 less half the squared distance of A* x from each centre."""
    return scores_of(teacher["centres"], scores_of(teacher["A"], x)) + teacher["b"].unsqueeze(-2)


def _hits(scores: Float[Tensor, "R B n"], target: Float[Tensor, "R B 1"]) -> Float[Tensor, "R B most"]:
    """1 where the label is among the j largest scores, j = 1 ... 5; equal ones as `torch.topk` ranks them."""
    best = scores.topk(min(MOST, scores.shape[-1])).indices
    return (best == target).to(scores.dtype).cumsum(-1)


def _at(part: Float[Tensor, "*part"], label: Int[Tensor, "*rows 1"]) -> Tensor:
    """The label's entry; samples in front of the part."""
    return entries(part, label).squeeze(-1)


@functools.lru_cache(maxsize=8)
def _pixels(
    dtype: torch.dtype, device: torch.device, split: Split
) -> tuple[Float[Tensor, "T 64"], Float[Tensor, "H 64"]]:
    """Pixels of training rows and those that are held out, less their mean in training, over one number.

    That number makes the mean square in training 1.
    """
    train, held_out = halves(dtype, device, split)
    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt()
    return (train - mean) / scale, (held_out - mean) / scale
