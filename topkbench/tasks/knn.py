"""`knn`: a k-nearest-neighbour classifier in a learned space; its k neighbours are the top k."""

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.randomness import Noise, Normals
from topkbench.tasks import _columns
from topkbench.tasks._contract import Batch, Teacher, check_counts, scores_of
from topkbench.tasks._csv import Table
from topkbench.tasks._split import Split, check_split, common

START = 0.5  # a row of W starts with a norm of about this
AT_ONCE = 128  # rows of a held-out batch
TINY = 1e-10  # a column of a variance below this share of its mean square is constant


class Half(NamedTuple):
    """The rows to train on, or those held out, and their classes."""

    x: Float[Tensor, "N columns"]
    y: Float[Tensor, " N"]


@dataclass(frozen=True)
class KNN:
    """q_j = -|W x - W c_j|^2, and the loss of a row is 1 - (1/k) sum_j m_j(q) 1{y_j = y}.

    x is a row of a table and y its class; the c_j are n other rows with classes y_j, the candidates. W
    `(R, embedding, d)` is to bring rows of the same class together. All come from the training rows: at each
    step every replicate shuffles its own and takes n as candidates, the same for all of the batch, and others
    as queries (in turn once more where there are fewer than asked for), so that none is its own neighbour.
    To each row belong `nuisance` more numbers, N(0, noise^2), drawn once for a replicate: without W they
    count as much as the columns do.

    The loss of the hard mask is the share of the k neighbours that are of another class. W acts through the
    choice alone: the hard gradient is 0 and W stays at its start. As the loss is linear in the mask, it
    tells what each candidate would be worth, and no more: 1 for one of the same class, 0 for another.

    Digits are pixels in [0, 1]. Other tables are standardised by their training rows. The split, 70 % to
    train on, has the same share of each class in both halves and is the same for every replicate
    (scikit-learn's, random_state 0): 1,257 and 540 digits, 398 and 171 tumours of breast_cancer.

    Metrics, in [0, 1], higher is better: `accuracy`, the share of held-out rows whose class has the most
    votes among their k nearest of all training rows (the first class where votes are equal). What it is
    without learning: `accuracy_raw`, with x itself, nuisance included, in place of W x, and `accuracy_pca`
    with its first `embedding` principal components. What neighbourhood components analysis makes of it:
    `baselines`. `hard_loss` has n candidates, drawn once; it cannot be 0 where a class has fewer than k of
    them.

    With the sizes below (8 replicates, Adam at 0.01, 400 steps of 100 rows) accuracy was 0.97 with the
    entropic relaxation at temperatures 0.3 and 1, and with its straight-through form at 1; 0.96 with k times
    the softmax at the same; 0.29 with plain straight-through; 0.22 with the hard gradient, where all start;
    raw 0.83, by principal components 0.78, by neighbourhood components analysis 0.95.

    Attributes:
        n: Candidates, in [k, training rows - 1].
        k: Neighbours, in [1, n].
        embedding: Rows of W, >= 1.
        nuisance: Columns of noise, >= 0.
        noise: Their standard deviation, >= 0.
        data: digits, breast_cancer, or the path of a .csv file.
        target: The column of the class, for a .csv file alone.
        split: "evaluation", or "tuning": the held-out rows are set aside, and the training rows are split
            once more in the same way, with random_state 1: 879 and 378 digits.

    Raises:
        ValueError: one of them out of range; a target that is no class, or a class with fewer than 4 rows to
            split; what `_csv.read` refuses.

    Cost: a step takes (n + B) d embedding + B n embedding multiplications a replicate and sorts a number for
    each training row, beside the method's. Those 400 steps of 8 replicates (`task=knn seeds=8
    train.batch=100 train.steps=400`) take 2 to 3 s on one core; n = 200 is usual. n = 1,000 is large: 50
    steps of the same take 1.1 s of processor time.

    Source: Grover, Wang, Zweig & Ermon 2019, "Stochastic Optimization of Sorting Networks via Continuous
    Relaxations", section 6.3; the same with a top-k mask, Xie et al. 2020, "Differentiable Top-k with Optimal
    Transport". Differs: digits and noise in place of images, a linear map in place of a network.
    """

    n: int = 200
    k: int = 9
    embedding: int = 8
    nuisance: int = 64
    noise: float = 0.5
    data: str = "digits"
    target: str | None = None
    split: Split = "evaluation"
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        check_counts(self.n, self.k, embedding=self.embedding)
        if self.nuisance < 0:
            raise ValueError(f"nuisance must be >= 0, got {self.nuisance}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be >= 0 and finite, got {self.noise}")
        check_split(self.split, of_table=True)
        most = len(_rows(self.data, self.target, self.split)[0]) - 1
        if self.n > most:
            raise ValueError(f"n must be <= {most}, the training rows of {self.data} but one, got {self.n}")

    @property
    def d(self) -> int:
        """Columns of the table and of nuisance."""
        return len(_table(self.data, self.target).names) + self.nuisance

    def teacher(self, noise: Noise) -> Teacher:
        """The nuisance of each row: `train` `(R, T, nuisance)` and `held_out` `(R, H, nuisance)`."""
        train, held_out = (len(rows) for rows in _rows(self.data, self.target, self.split))
        return {
            "train": self.noise * noise("train", train, self.nuisance),
            "held_out": self.noise * noise("held_out", held_out, self.nuisance),
        }

    def start(self, noise: Noise) -> Float[Tensor, "R embedding d"]:
        """Independent normal entries with standard deviation START / sqrt(d)."""
        return noise("W", self.embedding, self.d) * (START / self.d**0.5)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` training rows among n others, or the first `rows` that are held out, all if there are fewer.

        The target is a class: `(R, B, 1)`.
        """
        order = noise("order", teacher["train"].shape[1], law="uniform").argsort(dim=-1, stable=True)
        candidates, y = self._training(teacher, order[:, : self.n])
        given = {"candidates": candidates, "classes": y}
        if clean:
            x, y = self.held_out(teacher, rows)
            return Batch(x, y.unsqueeze(-1), teacher, {**given, **self._unlearned(teacher, x, y)})
        others = order[:, self.n :]
        turn = torch.arange(rows, device=order.device) % others.shape[1]
        x, y = self._training(teacher, others[:, turn])
        return Batch(x, y.unsqueeze(-1), teacher, given)

    def _training(self, teacher: Teacher, which: Int[Tensor, "R B"]) -> tuple[Tensor, Tensor]:
        """Training rows `(R, B, d)` and their classes `(R, B)`."""
        nuisance = teacher["train"]
        table = _halves(self.data, self.target, self.split, nuisance.dtype, nuisance.device)[0]
        own = nuisance.gather(1, which.unsqueeze(-1).expand(-1, -1, nuisance.shape[-1]))
        return torch.cat([table.x[which], own], -1), table.y[which]

    def training(self, teacher: Teacher) -> tuple[Float[Tensor, "R T d"], Float[Tensor, "R T"]]:
        """All training rows and their classes."""
        return self._all(teacher["train"], 0)

    def held_out(
        self, teacher: Teacher, rows: int | None = None
    ) -> tuple[Float[Tensor, "R H d"], Float[Tensor, "R H"]]:
        """The first `rows` that are held out and their classes; all of them if None."""
        x, y = self._all(teacher["held_out"], 1)
        return x[:, :rows], y[:, :rows]

    def _all(self, nuisance: Float[Tensor, "R N nuisance"], half: int) -> tuple[Tensor, Tensor]:
        table = _halves(self.data, self.target, self.split, nuisance.dtype, nuisance.device)[half]
        replicates = len(nuisance)
        x = torch.cat([table.x.expand(replicates, -1, -1), nuisance], -1)
        return x, table.y.expand(replicates, -1)

    def _unlearned(
        self, teacher: Teacher, x: Float[Tensor, "R B d"], y: Float[Tensor, "R B"]
    ) -> dict[str, Float[Tensor, " R"]]:
        """`accuracy_raw` and `accuracy_pca`, once for all: they do not depend on W."""
        train, classes = self.training(teacher)
        components = principal(train, self.embedding)
        return {
            "accuracy_raw": accuracy(train, classes, x, y, self.k),
            "accuracy_pca": accuracy(train @ components.mT, classes, x @ components.mT, y, self.k),
        }

    def scores(self, W: Float[Tensor, "R embedding d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """-|W x - W c|^2."""
        return closeness(scores_of(W, batch.x), scores_of(W, batch.given["candidates"]))

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:  # noqa: ARG002
        """The share of the k neighbours that are of another class."""
        same = (batch.given["classes"].unsqueeze(1) == batch.target).to(part.dtype)
        return 1 - (part * same).sum(-1) / self.k

    def metrics(self, W: Float[Tensor, "R embedding d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`accuracy`, `accuracy_raw` and `accuracy_pca`."""
        train, classes = self.training(test.teacher)
        found = accuracy(scores_of(W, train), classes, scores_of(W, test.x), test.target.squeeze(-1), self.k)
        return {"accuracy": found} | {name: test.given[name] for name in ("accuracy_raw", "accuracy_pca")}


def closeness(z: Float[Tensor, "R B e"], c: Float[Tensor, "R N e"]) -> Float[Tensor, "R B N"]:
    """-|z - c|^2 of all pairs, at the cost of a product of matrices."""
    return 2 * z @ c.mT - z.square().sum(-1, keepdim=True) - c.square().sum(-1).unsqueeze(-2)


def accuracy(
    train: Float[Tensor, "R T e"],
    classes: Float[Tensor, "R T"],
    x: Float[Tensor, "R B e"],
    y: Float[Tensor, "R B"],
    k: int,
) -> Float[Tensor, " R"]:
    """The share of rows x whose class y has the most votes among the k nearest training rows."""
    right = x.new_zeros(len(x))
    count = int(classes.max()) + 1
    for z, own in zip(x.split(AT_ONCE, 1), y.split(AT_ONCE, 1), strict=True):
        near = closeness(z, train).topk(k).indices
        votes = classes.gather(1, near.flatten(1)).view(near.shape).long()
        tally = x.new_zeros(*own.shape, count).scatter_add(-1, votes, torch.ones_like(votes, dtype=x.dtype))
        right += (tally.argmax(-1) == own).sum(-1)
    return right / x.shape[1]


def principal(x: Float[Tensor, "R N d"], count: int) -> Float[Tensor, "R e d"]:
    """The first `count` principal components, or all d."""
    centred = x - x.mean(1, keepdim=True)
    return torch.linalg.eigh(centred.mT @ centred).eigenvectors.mT.flip(-2)[:, :count]


def baselines(task: KNN, seed: int) -> dict[str, float]:
    """Held-out accuracy without top-k in training: `raw`, `pca`, and `nca` by scikit-learn.

    Neighbourhood components analysis (Goldberger, Roweis, Hinton & Salakhutdinov 2004) learns a W of the same
    size from all training rows: the mean share that a softmax over -|W x - W c|^2 gives to the same class.

    Args:
        task: On whose data.
        seed: Of the replicate: the same nuisance.
    """
    from sklearn.neighbors import NeighborhoodComponentsAnalysis

    teacher = task.teacher(Normals([seed], dtype=torch.float64).child("teacher"))
    (train, classes), (x, y) = task.training(teacher), task.held_out(teacher)
    nca = NeighborhoodComponentsAnalysis(min(task.embedding, task.d), random_state=0)
    W = torch.as_tensor(nca.fit(train[0].numpy(), classes[0].numpy()).components_).unsqueeze(0)
    found = task._unlearned(teacher, x, y)
    found["accuracy_nca"] = accuracy(scores_of(W, train), classes, scores_of(W, x), y, task.k)
    return {name.removeprefix("accuracy_"): column.item() for name, column in found.items()}


def _table(data: str, target: str | None) -> Table:
    """A table whose target is a class.

    Raises:
        ValueError: there is none, or its target is a quantity.
    """
    _columns.check_source(data, target, _columns.TABLES)
    table = _columns.table(data, target)
    if not table.classes:
        raise ValueError(f"{data}: column {target!r} is a quantity: it must be a class")
    return table


@functools.lru_cache(maxsize=8)
def _rows(data: str, target: str | None, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows to train on and which are held out."""
    return common(_table(data, target), split, data)


@functools.lru_cache(maxsize=8)
def _halves(
    data: str, target: str | None, split: Split, dtype: torch.dtype, device: torch.device
) -> tuple[Half, Half]:
    """The rows to train on and those held out; all but digits standardised by the former."""
    table = _table(data, target)
    train, held_out = _rows(data, target, split)
    x = table.x
    if data != "digits":
        x = x - x[train].mean(0)
        variance, size = x[train].var(0), (table.x[train] ** 2).mean(0)
        x = x / np.where(variance > TINY * size, variance, 1.0) ** 0.5
    first, second = (
        Half(*(torch.as_tensor(part[rows], dtype=dtype, device=device) for part in (x, table.y)))
        for rows in (train, held_out)
    )
    return first, second
