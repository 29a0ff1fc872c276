"""What a task is: where top-k sits, what is random, what is learned, and how good a W is."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.randomness import Noise

Teacher = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """x, what is to be learned on it, and who made it.

    Attributes:
        x: `(R, B, d)`.
        target: `(R, B, m)`.
        teacher: What the task planted, each `(R, ...)`; `teacher["W"]` is W* `(R, n, d)` where there is one.
        given: What all rows share besides, each `(R, ...)`: the candidates of a retriever, say.
        learned: What is learned beside W, each `(R, ...)`: see `Learns`.
    """

    x: Float[Tensor, "R B d"]
    target: Float[Tensor, "R B m"]
    teacher: Teacher
    given: Mapping[str, Tensor] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)

    def pieces(self, rows: int) -> Iterator["Batch"]:
        """The batch, so many rows at a time."""
        for start in range(0, self.x.shape[1], rows):
            part = slice(start, start + rows)
            yield dataclasses.replace(self, x=self.x[:, part], target=self.target[:, part])

    def replicates(self, which: Tensor | slice) -> "Batch":
        """The batch of some of the replicates."""
        parts = {"teacher": self.teacher, "given": self.given, "learned": self.learned}
        chosen = {name: {key: one[which] for key, one in part.items()} for name, part in parts.items()}
        return Batch(self.x[which], self.target[which], **chosen)


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass with the sizes n, d, k and what else it needs."""

    n: int
    d: int
    k: int
    wants: ClassVar[Part]
    """What the loss is a function of: "mask" `(R, B, n)` or "values" `(R, B, k)`."""

    def teacher(self, noise: Noise) -> Teacher:
        """What is planted, from standard normals (see `randomness.Noise`)."""
        ...

    def start(self, noise: Noise) -> Float[Tensor, "R n d"]:
        """The W a learner starts from."""
        ...

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` fresh rows; `clean` ones are held out and carry no target noise."""
        ...

    def scores(self, W: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """What top-k ranks: `scores_of(W, batch.x)` where nothing else is said."""
        ...

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """The loss per row of the mask or the values (see `wants`), hard or relaxed; samples in front."""
        ...

    def metrics(self, W: Float[Tensor, "R n d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """How good W is on held-out rows with the hard top-k: a column of the record each."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A task that learns more than W; it finds it in `batch.learned`."""

    def others(self, teacher: Teacher, noise: Noise, W: Float[Tensor, "R n d"]) -> dict[str, Tensor]:
        """What it starts from, each `(R, ...)`, beside the start W; the optimizer moves it as it moves W."""
        ...


def others_of(task: Task, teacher: Teacher, noise: Noise, W: Float[Tensor, "R n d"]) -> dict[str, Tensor]:
    """What the task learns beside W, where it starts: nothing for most."""
    return task.others(teacher, noise, W) if isinstance(task, Learns) else {}


@runtime_checkable
class KnownInputs(Protocol):
    """A task whose scores are W x with x of a known density: the gradient of its mean hard loss is known.

    See `methods._flux`, which asks for no more than this. Where with some of its settings the loss of a row
    depends on other rows, a property `couples_rows` says so.
    """

    def moved(self, batch: Batch, rows: Tensor, x: Float[Tensor, "R T d"]) -> Batch:
        """The rows `(R, T)` of a batch with other x, and with what is to be learned there.

        Noise on a target moves along with its row.
        """
        ...

    def line_density(
        self, x: Float[Tensor, "R T d"], direction: Float[Tensor, "R T d"]
    ) -> Float[Tensor, "R T"]:
        """The density at x along a unit direction, given where x lies across it: per unit of length."""
        ...

    def line_mass(
        self, x: Float[Tensor, "R T d"], direction: Float[Tensor, "R T d"], near: float
    ) -> Float[Tensor, "R T"]:
        """The chance to be nearer than `near` to x along it, at either side, given where x lies across it."""
        ...


@runtime_checkable
class KnownExpectation(Protocol):
    """A task whose subset is random and whose mean loss is exact, by enumeration: it is what is evaluated."""

    def population(self, teacher: Teacher) -> Batch:
        """All rows that a mini-batch is drawn from."""
        ...

    def population_loss(self, W: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, " R"]:
        """The mean loss over the law of the subset and over the rows of a batch.

        Differentiable in W and in what is learned beside it.
        """
        ...


def check_counts(n: int, k: int, **others: int) -> None:
    """Refuse sizes that cannot be.

    Raises:
        ValueError: n or another, by name, below 1; k outside [1, n].
    """
    for name, size in {"n": n, **others}.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, n] = [1, {n}], got {k}")


def entries(part: Float[Tensor, "*part"], places: Int[Tensor, "*rows r"]) -> Tensor:
    """The entries of each row at its places; samples in front of the part."""
    return part.gather(-1, places.expand(*part.shape[:-1], places.shape[-1]))


def scores_of(W: Float[Tensor, "R n d"], x: Float[Tensor, "R B d"]) -> Float[Tensor, "R B n"]:
    """Q = W x for every row x."""
    return x @ W.mT
