"""What a method is: a callable that turns one `Step` into a surrogate loss whose gradient is its estimate."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from topkbench.operators import Operator
from topkbench.operators._contract import Part, Temperature, bound
from topkbench.randomness import Noise


@dataclass(frozen=True)
class Inputs:
    """What a task knows of where its rows come from: see `tasks.KnownInputs`.

    Attributes:
        elsewhere: `elsewhere(replicates, rows, x)`: the loss, as `Step.loss`, of rows `(R, T)` of some of the
            replicates at other x `(R, T, d)`.
        line_density: `line_density(x, direction)`: the density of x along a unit direction `(R, T, d)`,
            given where x lies across it: `(R, T)`.
        line_mass: `line_mass(x, direction, near)`: the chance to be nearer than that to x along it: `(R, T)`.
    """

    elsewhere: Callable[[slice, Tensor, Tensor], Callable[[Tensor], Tensor]]
    line_density: Callable[[Tensor, Tensor], Tensor]
    line_mass: Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Step:
    """Everything a method may look at, by name. R replicates, B rows of x each.

    Attributes:
        W: `(R, n, d)`, or whatever `(R, a, b)` the task learns; carries the gradient.
        x: `(R, B, d)`, the mini-batch.
        scores: `(R, B, n)`, `x W^T` in most tasks; carries the gradient.
        k: How many scores are kept.
        wants: What the task's loss is a function of: the "mask" `(R, B, n)` or the "values" `(R, B, k)`.
        loss: The task's loss of that part, per row: `(R, B)`.
        noise: `noise(name, *shape)` draws standard normals `(R, *shape)`, each replicate from its own
            generator; one name for each draw of a step.
        memory: What a method keeps from one training step to the next: tensors `(R, ...)` by name, read and
            replaced in place (`step.memory["beta"] = ...`). Empty at the first step; where a gradient is
            only looked at, a copy.
        inputs: How x is distributed, where the task knows: None else.
        expected: The exact mean loss `(R, B)` where the subset is random and the task knows it: None else.
    """

    W: Float[Tensor, "R a b"]
    x: Float[Tensor, "R B d"]
    scores: Float[Tensor, "R B n"]
    k: int
    wants: Part
    loss: Callable[[Tensor], Float[Tensor, "R B"]]
    noise: Noise
    memory: dict[str, Tensor] = field(default_factory=dict)
    inputs: Inputs | None = None
    expected: Callable[[], Float[Tensor, "R B"]] | None = None

    def of(self, part: Float[Tensor, "*part"]) -> Float[Tensor, "*losses"]:
        """The loss per row of a mask `(*s, R, B, n)` or, where values are wanted, of a selection.

        Args:
            part: The mask, or the selection `(*s, R, B, k, n)`; axes in front are samples.
        """
        if self.wants == "values":
            part = (part @ self.scores.unsqueeze(-1)).squeeze(-1)
        return self.loss(part)


BOTH: tuple[Part, ...] = ("mask", "values")


def answers_for(method: object) -> tuple[Part, ...]:
    """The parts that a method can be asked for (see `Step.wants`)."""
    return getattr(method, "wants", BOTH)


def needs_objective(method: object) -> bool:
    """Whether a method looks at values of the loss, not at its derivative in the part alone."""
    return getattr(method, "needs_objective", False)


def refuse(method: object, step: Step) -> None:
    """Refuse a step that a method has no answer for.

    Raises:
        ValueError: the task wants a part that is not among the method's.
    """
    if step.wants not in answers_for(method):
        name, part = type(method).__name__, " or ".join(answers_for(method))
        raise ValueError(f"{name} needs a task whose loss is a function of the {part}, not of {step.wants}")


@runtime_checkable
class Method(Protocol):
    """How a gradient reaches W.

    A method with a `temperature` field takes a number > 0 there or a tensor `(R, 1, 1)`: the loop
    puts each replicate's own, scheduled temperature in its place.

    A method that cannot answer for both parts says for which it can: `wants: ClassVar[tuple[Part, ...]] =
    ("mask",)`. Without that it is taken to be `BOTH`. One that looks at values of the loss, so that it does
    without a derivative but not without the objective, says `needs_objective: ClassVar[bool] = True`.
    """

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise of its own, so that its gradient varies on one and the same mini-batch."""
        ...

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """A surrogate loss per row.

        Its value is the loss of the method's own forward pass (logged as the relaxed loss); its gradient
        with respect to W is the estimate.
        """
        ...


@dataclass(frozen=True)
class OfOperator:
    """What methods that go through an operator share.

    Attributes:
        operator: Any of `topkbench.operators`, or a `functools.partial` of one with its options.
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own (its values are not looked at).

    Raises:
        TypeError: operator is neither of the two.
        ValueError: temperature <= 0, infinite or NaN.
    """

    operator: Operator | functools.partial
    temperature: Temperature = 1.0

    @property
    def stochastic(self) -> bool:
        """An operator draws nothing."""
        return False

    def __post_init__(self) -> None:
        bound(self.operator)
        positive(temperature=self.temperature)


@dataclass(frozen=True)
class OfNoisyOperator(OfOperator):
    """What methods share that go through an operator and may put noise on what it ranks.

    The operator ranks `scores + scale * noise`; the values are still those of the scores.

    Attributes:
        operator: Any of `topkbench.operators`, or a `functools.partial` of one with its options.
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own (its values are not looked at).
        noise: The law of the noise, standard: "gumbel" (the k largest are then k draws without replacement
            from softmax(scores / scale)) or "normal"; "none" for no noise.
        scale: How strong it is, > 0.

    Raises:
        TypeError: operator is neither of the two.
        ValueError: temperature or scale <= 0, infinite or NaN; a noise that is not one of the three.
    """

    noise: Literal["none", "gumbel", "normal"] = "none"
    scale: float = 1.0

    @property
    def stochastic(self) -> bool:
        """Whether there is noise."""
        return self.noise != "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("noise", self.noise, ("none", "gumbel", "normal"))
        positive(scale=self.scale)

    def ranked(self, step: Step) -> Float[Tensor, "R B n"]:
        """What is ranked: the scores, with noise where there is any."""
        if self.noise == "none":
            return step.scores
        return step.scores + self.scale * step.noise("ranking", *step.scores.shape[1:], law=self.noise)


def positive(**numbers: Temperature) -> None:
    """Refuse numbers that are not > 0 and finite; the values of a tensor are not looked at.

    Raises:
        ValueError: one of them, by name.
    """
    for name, number in numbers.items():
        if not isinstance(number, Tensor) and not 0 < number < float("inf"):
            raise ValueError(f"{name} must be > 0 and finite, got {number}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not among those allowed.

    Raises:
        ValueError: with what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value}")
