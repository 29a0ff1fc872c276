"""The score function of a perturbation (evolution strategies): the losses of noisy choices are enough."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.methods._contract import Step, positive
from topkbench.operators import About
from topkbench.operators._contract import Temperature, check_size
from topkbench.operators._top import top_indices
from topkbench.operators.perturbed import Law, check_draws


@dataclass(frozen=True)
class PerturbedScore:
    """The mean loss of N hard top-k of noisy scores; its gradient from those losses alone, unbiased.

        F(s) = E L(H(s + sigma Z)),     vjp = (1 / (sigma N)) sum_i nu'(Z_i) (L_i - b_i) + mean_i dL_i / ds,

    density of Z = exp(-nu): nu'(z) is z for the normal law, 1 - exp(-z) for the Gumbel law; b_i is the mean
    of the other losses. dL_i / ds is that of a loss that also looks at the scores, the choice held constant.
    `Perturbed` takes the loss of the mean mask and its derivative; this needs neither, and is unbiased
    whatever the loss. With Gumbel noise of size 1 it estimates the same gradient as the score function of
    the Plackett-Luce law.

    Where values are wanted, they are the scores at the ranks of the noisy ones.

    Attributes:
        temperature: sigma > 0, the size of the noise; a tensor `(R, 1, 1)` gives each replicate its own.
        samples: N >= 2, how many noisy copies, each with a loss of its own; even where they come in pairs.
        noise: The law of the noise, standard: "normal" or "gumbel".
        antithetic: Whether it is drawn in pairs Z, -Z (normal only). No b_i then: it would cancel.

    Raises:
        ValueError: temperature or samples out of range, or an unknown noise.

    Source: Salimans, Ho, Chen, Sidor & Sutskever 2017, "Evolution Strategies as a Scalable Alternative to
    Reinforcement Learning" (normal noise, pairs); Berthet et al. 2020, "Learning with Differentiable
    Perturbed Optimizers", for nu'. Differs: the scores of top-k are perturbed, not the parameters; the
    leave-one-out baseline is that of Kool et al. 2019.
    """

    about: ClassVar[About] = About(
        "score function", "N top-k and N losses", "Salimans et al. 2017", "explicit formula; Plackett-Luce"
    )
    temperature: Temperature = 1.0
    samples: int = 10
    noise: Law = "normal"
    antithetic: bool = False
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        check_draws(self.samples, self.noise, self.antithetic, centred=True)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The mean loss of the noisy choices."""
        check_size(self.samples * step.scores.numel(), step.scores, "noisy copies")
        count = self.samples // 2 if self.antithetic else self.samples
        noise = step.noise("perturbation", count, *step.scores.shape[1:], law=self.noise).movedim(1, 0)
        if self.antithetic:
            noise = torch.cat([noise, -noise])
        noisy = step.scores.detach() + self.temperature * noise
        losses = step.loss(_part(step, top_indices(noisy, step.k, ranked=True)))
        loss = losses.mean(0)
        if not torch.is_grad_enabled():
            return loss
        slope = noise if self.noise == "normal" else 1 - (-noise).exp()
        vjp = (slope * self._advantage(losses.detach()).unsqueeze(-1)).mean(0) / self.temperature
        term = (vjp * step.scores).sum(-1)
        return loss + (term - term.detach())

    def _advantage(self, losses: Float[Tensor, "N R B"]) -> Float[Tensor, "N R B"]:
        if self.antithetic:
            return losses
        return (losses - losses.mean(0)) * (self.samples / (self.samples - 1))  # less the mean of the others


def _part(step: Step, index: Int[Tensor, "N R B k"]) -> Tensor:
    """The mask of the kept scores, or their values, with the gradient of the scores."""
    scores = step.scores.expand(*index.shape[:-1], -1)
    if step.wants == "values":
        return scores.gather(-1, index)
    return torch.zeros_like(scores, memory_format=torch.contiguous_format).scatter(-1, index, 1)
