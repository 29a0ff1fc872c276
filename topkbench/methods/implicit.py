"""Estimators that differentiate through a solver by calling it twice: black-box, implicit MLE, adaptive."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, one_of, positive
from topkbench.methods._finite_difference import finite_difference
from topkbench.methods.noises import LAWS, Law, draws
from topkbench.operators import About


@dataclass(frozen=True)
class BlackBox:
    """The hard top-k, differentiated as any solver: `(H(s) - H(s - lambda g)) / lambda`.

    The exact gradient of an interpolation of the loss, linear in g, that is the coarser the larger lambda.
    It is 0 while lambda g does not make two scores swap.

    Attributes:
        strength: lambda, > 0; about as large as the scores over their gradients.

    Raises:
        ValueError: strength <= 0, infinite or NaN.

    Source: Vlastelica et al. 2020, "Differentiation of Blackbox Combinatorial Solvers", eq. (3) and
    Algorithm 1. Differs: scores are maximised where the source minimises costs.
    """

    about: ClassVar[About] = About(
        "finite difference", "two top-k", "Vlastelica et al. 2020", "explicit formula; pyepo"
    )
    strength: float = 1.0
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(strength=self.strength)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The hard loss; its gradient is the finite difference."""
        return finite_difference(step, torch.zeros_like(step.scores), lambda _: self.strength)


@dataclass(frozen=True)
class ImplicitMLE:
    """Perturb and maximise, and move towards what a step against the gradient would maximise (I-MLE).

        (H(s + e) - H(s + e - lambda g)) / lambda,    the same noise e in both

    Attributes:
        strength: lambda, > 0: how far the target lies.
        noise: The law of e: "gamma" (see `noises.sum_of_gammas`), "gumbel", "normal" or "none".
        scale: How strong the noise is, > 0.
        samples: How many draws of e are averaged, each with a loss of its own; >= 1.
        symmetric: Whether the difference is taken from both sides.

    Raises:
        ValueError: strength, scale or samples out of range, or an unknown noise.

    Source: Niepert, Minervini & Franceschi 2021, "Implicit MLE: Backpropagating Through Discrete Exponential
    Family Distributions", Algorithm 1. Differs: divided by lambda, which the published code leaves out by
    default, so that here a learning rate means the same at every lambda.
    """

    about: ClassVar[About] = About(
        "finite difference",
        "two top-k a sample",
        "Niepert et al. 2021",
        "formula, SIMPLE toy; pyepo",
    )
    strength: float = 1.0
    noise: Law = "gamma"
    scale: float = 1.0
    samples: int = 1
    symmetric: bool = False

    @property
    def stochastic(self) -> bool:
        """Whether there is noise."""
        return self.noise != "none"

    def __post_init__(self) -> None:
        positive(strength=self.strength, scale=self.scale)
        one_of("noise", self.noise, LAWS)
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the perturbed top-k; its gradient is the finite difference."""
        noise = self.scale * draws(step, "perturbation", self.noise, self.samples)
        return finite_difference(step, noise, lambda _: self.strength, symmetric=self.symmetric)


@dataclass(frozen=True)
class AdaptiveIMLE(ImplicitMLE):
    """Implicit MLE with a strength that finds itself.

    `lambda = beta |s| / |g|`, norms over all rows of the mini-batch. beta goes up by `rate` while the moving
    average of the number of non-zeros in a row's gradient is below `target`, else down; it stays >= 0.
    beta and the average are kept in `step.memory`, a number each for a replicate.

    Attributes:
        strength: beta at the first step, > 0.
        noise: The law of e: "gamma" (see `noises.sum_of_gammas`), "gumbel", "normal" or "none".
        scale: How strong the noise is, > 0.
        samples: How many draws of e are averaged, each with a loss of its own; >= 1.
        symmetric: Whether the difference is taken from both sides.
        rate: How much beta changes in a step, > 0.
        decay: Of the moving average, in [0, 1).
        target: How many non-zeros a row's gradient should have, > 0.

    Raises:
        ValueError: one of them out of range, or an unknown noise.

    Source: Minervini, Franceschi & Niepert 2023, "Adaptive Perturbation-Based Gradient Estimation for
    Discrete Latent Variable Models". Differs: one lambda for the step and the division by it.
    """

    about: ClassVar[About] = About(
        "finite difference", "two top-k a sample", "Minervini et al. 2023", "explicit formula"
    )
    rate: float = 1e-4
    decay: float = 0.9
    target: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(rate=self.rate, target=self.target)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the perturbed top-k; its gradient is the finite difference."""
        ones = torch.ones_like(step.scores[:, 0, 0].detach())
        beta = step.memory.get("beta", self.strength * ones)
        average = step.memory.get("non-zeros", ones)

        def adapt(difference: Tensor) -> None:
            non_zeros = (difference != 0).to(beta.dtype).sum(-1).mean(-1)
            now = self.decay * average + (1 - self.decay) * non_zeros.reshape(-1, len(beta)).mean(0)
            step.memory["non-zeros"] = now
            up = torch.where(now < self.target, 1, -1).to(beta.dtype)
            step.memory["beta"] = (beta + self.rate * up).clamp(min=0)

        noise = self.scale * draws(step, "perturbation", self.noise, self.samples)
        return finite_difference(
            step,
            noise,
            lambda g: self._strength(step, beta, g),
            symmetric=self.symmetric,
            observe=adapt,
        )

    def _strength(self, step: Step, beta: Tensor, g: Tensor) -> Tensor:
        """Beta |s| / |g| of every replicate, to broadcast with g; s counts as often as g has copies of it."""
        rows = g.dim() - (3 if step.wants == "values" else 2)  # the first axis after R
        squares = g.square().flatten(rows).sum(-1).reshape(-1, len(beta)).sum(0)
        size = step.scores.detach().square().flatten(1).sum(-1) * (g.numel() // step.scores.numel())
        scale = beta * (size / torch.where(squares > 0, squares, 1)).sqrt() * (squares > 0)
        return scale.reshape(-1, *[1] * (g.dim() - rows))
