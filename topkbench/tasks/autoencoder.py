"""`autoencoder`: a sparse code of k numbers, and a dictionary learned beside it."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from topkbench.operators import hard_mask
from topkbench.operators._contract import Part
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher, check_counts, scores_of
from topkbench.tasks._digits_binary import PIXELS, drawn, first, halves
from topkbench.tasks._split import Split, check_split

CODE = (0.5, 1.5)  # what an active atom of the planted dictionary is multiplied with
ALIKE = 0.9  # the cosine above which an atom counts as found
AT_ONCE = 128  # rows of a held-out batch
Data = Literal["planted", "digits"]


@dataclass(frozen=True)
class Autoencoder:
    """z = m(q) * q with q = W x + b, x' = sum_i z_i D_i; the loss is |x' - x|^2 / 2. D and b are learned too.

    The encoder W `(R, n, d)` with its bias b `(R, n)` ranks; the decoder D `(R, n, d)` has rows (atoms) that
    the loss divides by their norm, so that a code cannot shrink while its atom grows. W and D start as the
    same random unit vectors, and go apart from there. There are two kinds of x:

    - planted: x = sum_(i in S) c_i D*_i + noise, S a uniformly random k-subset, c_i uniform on [1/2, 3/2], D*
      n random unit vectors. Held-out rows carry no noise. W* is the pseudo-inverse of D*: it reads the codes
      off exactly where n <= d; with more atoms than dimensions they overlap, and no linear W ranks them
      without error.
    - digits: scikit-learn's 1,797 digits, pixels in [0, 1] less their mean in training, d = 64; 70 % to train
      on, drawn with replacement, and the others held out (540, however many rows are asked for).

    The hard gradient is right for D and, for an atom that is kept, right but for the jump of the loss where
    two scores swap. An atom that no row keeps gets none in W, b or D: it stays dead. At n = 64, d = 32, k = 4
    (Adam at 0.01, 2,000 steps of 32 rows) it left 17 % of the atoms dead, at an fvu of 0.165; a
    straight-through sparsemax 7 %, at 0.130. On digits with n = 256, k = 8 (Adam at 0.002, 3,000 steps of 128
    rows) fvu was 0.145 and 0.146, and 2 % and none were dead.

    `auxiliary` > 0 adds to the training loss that term times `|e' - e|^2 / 2`: e = x - x' held constant, e'
    its reconstruction from the d / 2 largest scores of the atoms that no row of the mini-batch keeps. It is
    for any method, and is not part of the loss on held-out rows. At 1/32 the hard gradient left 13 % of the
    planted atoms dead, at an fvu of 0.150; on digits 7 %, at 0.147: most of the atoms that a mini-batch of
    them does without are not dead, and are better left alone.

    Metrics, on held-out rows with the hard top-k: `fvu`, the fraction of variance unexplained,
    `sum |x' - x|^2 / sum |x - mean|^2`, >= 0, lower is better; `dead`, the share of atoms that no held-out
    row keeps, in [0, 1]; and for planted data `recovery`, the mean over D* of the largest cosine with an atom
    of D, in [-1, 1], 1 where the dictionary is found, and `found`, the share where it is above 0.9.

    Attributes:
        n: Atoms, >= 1.
        d: The dimension of x, >= 1; 64 for digits.
        k: Numbers in a code, in [1, n].
        data: "planted" or "digits".
        noise: The standard deviation of the noise on planted training rows, >= 0.
        auxiliary: The weight of the term for dead atoms, >= 0; 1/32 in its source.
        split: "evaluation", or "tuning" (for digits): the held-out rows are set aside, and the training rows
            split once more in the same way, with random_state 1: 879 to train on, 378 held out.

    Raises:
        ValueError: one of them out of range.

    Cost: a step takes 4 B n d multiplications beside the method's; n = 64, d = 32 is small, n = 256, d = 64
    the usual size for digits. At n = 1,024 on digits, 50 steps of `entropic` (k = 8, batches of 128, 8
    replicates) take 1.7 s of processor time.

    Source: Makhzani & Frey 2014, "k-Sparse Autoencoders"; the term for dead atoms, Gao et al. 2024, "Scaling
    and evaluating sparse autoencoders", appendix A.2; recovery, Sharkey, Braun & Millidge 2022, "Taking
    features out of superposition with sparse autoencoders". Differs: in place of a bias of the decoder, x has
    its mean taken off (digits) or none (planted); an atom counts as dead by the mini-batch, not by the last
    million rows; where fewer are dead than may be used, the term counts for as much less.
    """

    n: int
    d: int
    k: int
    data: Data = "planted"
    noise: float = 0.01
    auxiliary: float = 0.0
    split: Split = "evaluation"
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        check_counts(self.n, self.k, d=self.d)
        if self.data not in get_args(Data):
            raise ValueError(f"data must be one of {', '.join(get_args(Data))}, got {self.data!r}")
        if self.data == "digits" and self.d != PIXELS:
            raise ValueError(f"d must be {PIXELS} for digits, got {self.d}")
        for name, value in (("noise", self.noise), ("auxiliary", self.auxiliary)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        check_split(self.split, self.data == "digits")

    def teacher(self, noise: Noise) -> Teacher:
        """D* and its pseudo-inverse W*; the mean of the training digits."""
        if self.data == "digits":
            like = noise("D", self.d)  # for the number of replicates
            return {"mean": halves(like.dtype, like.device, self.split)[0].mean(0).expand_as(like)}
        D = normalize(noise("D", self.n, self.d), dim=-1)
        return {"W": torch.linalg.pinv(D.mT), "D": D}

    def start(self, noise: Noise) -> Float[Tensor, "R n d"]:
        """Random unit vectors."""
        return normalize(noise("W", self.n, self.d), dim=-1)

    def others(
        self,
        teacher: Teacher,  # noqa: ARG002
        noise: Noise,  # noqa: ARG002
        W: Float[Tensor, "R n d"],
    ) -> dict[str, Tensor]:
        """D: the start W, so that an atom is what its score looks for; b: 0."""
        return {"D": W.clone(), "b": torch.zeros_like(W[..., 0])}

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` fresh rows; `clean` ones are held out, at most 540 for digits."""
        x = (self._digits if self.data == "digits" else self._planted)(teacher, noise, rows, clean)
        in_training = self.auxiliary and not clean
        given = {"auxiliary": x.new_full((len(x),), self.auxiliary)} if in_training else {}
        return Batch(x, x, teacher, given)

    def _digits(self, teacher: Teacher, noise: Noise, rows: int, clean: bool) -> Float[Tensor, "R B d"]:
        mean = teacher["mean"]
        train, held_out = halves(mean.dtype, mean.device, self.split)
        x = first(held_out, rows, len(mean)) if clean else drawn(train, noise, rows)
        return x - mean.unsqueeze(1)

    def _planted(self, teacher: Teacher, noise: Noise, rows: int, clean: bool) -> Float[Tensor, "R B d"]:
        x = self._codes(noise, rows) @ teacher["D"]
        return x if clean else x + self.noise * noise("x", rows, self.d)

    def _codes(self, noise: Noise, rows: int) -> Float[Tensor, "R B n"]:
        """As many numbers as are kept, at random places."""
        places = noise("support", rows, self.n, law="uniform").topk(self.k).indices
        low, high = CODE
        values = low + (high - low) * noise("code", rows, self.k, law="uniform")
        return values.new_zeros(*places.shape[:-1], self.n).scatter(-1, places, values)

    def scores(self, W: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """W x + b."""
        return scores_of(W, batch.x) + batch.learned["b"].unsqueeze(-2)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """Half the squared error of the reconstruction; in training, with the term for dead atoms."""
        D = normalize(batch.learned["D"], dim=-1)
        error = batch.target - (part * scores) @ D
        loss = error.square().sum(-1) / 2
        if "auxiliary" in batch.given:
            loss = loss + batch.given["auxiliary"].unsqueeze(-1) * self._of_dead(error.detach(), scores, D)
        return loss

    def _of_dead(self, error: Tensor, scores: Tensor, D: Tensor) -> Float[Tensor, "*losses"]:
        """Half the squared error of what the dead atoms make of the error; 0 where none is dead.

        Where fewer are dead than may be used, it counts for as much less.
        """
        most = min(max(1, self.d // 2), self.n)
        dead = (hard_mask(scores, self.k).sum(1, keepdim=True) == 0).to(scores.dtype)
        used = hard_mask(scores.masked_fill(dead == 0, -torch.inf), most) * dead
        share = (dead.sum(-1) / most).clamp(max=1)
        return share * (error - (used * scores) @ D).square().sum(-1) / 2

    def metrics(self, W: Float[Tensor, "R n d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`fvu`, `dead` and, where a dictionary is planted, `recovery` and `found`."""
        D = normalize(test.learned["D"], dim=-1)
        error, uses = W.new_zeros(len(W)), W.new_zeros(W.shape[:2])
        for piece in test.pieces(AT_ONCE):
            scores = self.scores(W, piece)
            mask = hard_mask(scores, self.k)
            error += ((mask * scores) @ D - piece.x).square().sum((1, 2))
            uses += mask.sum(1)
        spread = (test.x - test.x.mean(1, keepdim=True)).square().sum((1, 2))
        columns = {"fvu": error / spread, "dead": (uses == 0).to(W.dtype).mean(-1)}
        if "D" in test.teacher:
            best = (test.teacher["D"] @ D.mT).amax(-1)
            columns |= {"recovery": best.mean(-1), "found": (best > ALIKE).to(W.dtype).mean(-1)}
        return columns
