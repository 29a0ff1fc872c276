"""torch.optim's SGD, momentum and Adam with a learning rate for each replicate.

torch.optim takes one rate, so it steps at rate 1 on a tensor of zeros, and W moves from where it was by
that move times each replicate's own rate. For these three the step is proportional to the rate and does
not look at W, so this is the step torch.optim would take. (With weight decay it would not be.)
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Optimizer(Protocol):
    """A frozen dataclass with a learning rate `lr`, a number > 0 or a tensor `(R,)`."""

    lr: float | Tensor

    def build(self, moves: list[Tensor]) -> torch.optim.Optimizer:
        """The torch optimizer of these, at rate 1."""
        ...


@dataclass(frozen=True)
class SGD:
    """`W <- W - lr * v`, `v <- momentum * v + gradient`; see `torch.optim.SGD`.

    Attributes:
        lr: Learning rate, > 0; a tensor `(R,)` gives each replicate its own.
        momentum: In [0, 1).
        nesterov: Nesterov's form of the momentum.
    """

    lr: float | Tensor
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self.lr, momentum=self.momentum)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum > 0, got 0")

    def build(self, moves: list[Tensor]) -> torch.optim.Optimizer:
        """SGD at rate 1."""
        return torch.optim.SGD(moves, lr=1.0, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class Adam:
    """Kingma & Ba 2015; see `torch.optim.Adam`.

    Attributes:
        lr: Learning rate, > 0; a tensor `(R,)` gives each replicate its own.
        beta1: Decay of the mean of gradients, in [0, 1).
        beta2: Decay of the mean of their squares, in [0, 1).
        eps: Added to the root of the latter, > 0.
    """

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self.lr, beta1=self.beta1, beta2=self.beta2)
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")

    def build(self, moves: list[Tensor]) -> torch.optim.Optimizer:
        """Adam at rate 1."""
        return torch.optim.Adam(moves, lr=1.0, betas=(self.beta1, self.beta2), eps=self.eps)


class Stepper:
    """Moves all that is learned by an optimizer, each replicate at its own rate."""

    def __init__(self, optimizer: Optimizer, learned: dict[str, Tensor]) -> None:
        self.moves = {name: torch.zeros_like(value, requires_grad=True) for name, value in learned.items()}
        self.inner = optimizer.build(list(self.moves.values()))
        self.rate = per_replicate("lr", optimizer.lr, next(iter(learned.values())))

    @torch.no_grad()
    def __call__(self, learned: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next values."""
        for name, move in self.moves.items():
            move.zero_()
            move.grad = gradients[name]
        self.inner.step()
        return {name: value + like(self.rate, value) * self.moves[name] for name, value in learned.items()}


def like(numbers: Tensor, tensor: Tensor) -> Tensor:
    """A number for each replicate, `(R,)`, shaped to broadcast with a tensor `(R, ...)`."""
    return numbers.reshape(-1, *[1] * (tensor.dim() - 1))


def per_replicate(name: str, value: float | Tensor, W: Float[Tensor, "R n d"]) -> Float[Tensor, " R"]:
    """A number for each replicate, from one number or from a tensor of R.

    Raises:
        ValueError: another number of values, or one that is not > 0 and finite.
    """
    values = torch.as_tensor(value, dtype=W.dtype, device=W.device).flatten()
    if len(values) not in (1, len(W)):
        raise ValueError(f"{name} must be one number or {len(W)}, one a replicate, got {len(values)}")
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"{name} must be > 0 and finite, got {values.tolist()}")
    return values.expand(len(W))


def _check(lr: float | Tensor, **decays: float) -> None:
    if not isinstance(lr, Tensor) and not 0 < lr < float("inf"):
        raise ValueError(f"lr must be > 0 and finite, got {lr}")
    for name, decay in decays.items():
        if not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1), got {decay}")
