"""What a task is: where top-k sits, what is random, what is learned, and how far W is from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.randomness import Noise

Teacher = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """x, what is to be learned on it, and who made it.

    Attributes:
        x: `(R, B, d)`.
        target: `(R, B, k or n)`.
        teacher: What the task planted, each `(R, ...)`; `teacher["W"]` is W* `(R, n, d)`.
    """

    x: Float[Tensor, "R B d"]
    target: Float[Tensor, "R B m"]
    teacher: Teacher


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
        """`rows` fresh rows; `clean` ones carry no target noise."""
        ...

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """The loss per row of the mask or the values (see `wants`), hard or relaxed; samples in front."""
        ...

    def match(self, W: Float[Tensor, "R n d"], teacher: Teacher) -> Float[Tensor, "R n d"]:
        """W with its rows named as the teacher names them, where the loss cannot tell the names apart."""
        ...

    def distance(self, matched: Float[Tensor, "R n d"], teacher: Teacher) -> Float[Tensor, " R"]:
        """`|W - W*| / |W*|` of a matched W, up to what else the loss cannot tell apart."""
        ...


def scores_of(W: Float[Tensor, "R n d"], x: Float[Tensor, "R B d"]) -> Float[Tensor, "R B n"]:
    """Q = W x for every row x."""
    return x @ W.mT
