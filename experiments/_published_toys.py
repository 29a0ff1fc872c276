"""What `published_toys.py` needs: the toys as published, their conventions, and how estimates are summed."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from topkbench.gradients import Sampling, measure, true_gradient
from topkbench.methods import Method, Simple, Step
from topkbench.operators.hard import straight_through
from topkbench.randomness import Noise, Normals, Repeated
from topkbench.step import WEIGHTS, copies, gradients
from topkbench.tasks import Batch, SubsetToy, Teacher

AT_ONCE = 2000  # copies of every replicate


@dataclass(frozen=True)
class Around:
    """A method with a convention of its published code that differs from the one here."""

    method: Method

    @property
    def stochastic(self) -> bool:
        """Whether the method is."""
        return self.method.stochastic


@dataclass(frozen=True)
class Times(Around):
    """Its gradient times a factor: the published code of I-MLE and SIMPLE-F/-B does not divide by lambda."""

    factor: float

    def __call__(self, step: Step) -> Tensor:
        """The loss of the method."""
        loss = self.method(step)
        return loss.detach() + self.factor * (loss - loss.detach())


@dataclass(frozen=True)
class OfLogSigmoid(Around):
    """It sees logsigmoid(scores): SoftSub in the code of SIMPLE, scores being Bernoulli log-odds."""

    def __call__(self, step: Step) -> Tensor:
        """The loss of the method."""
        return self.method(dataclasses.replace(step, scores=logsigmoid(step.scores)))


@dataclass(frozen=True)
class LessMean(Around):
    """It sees the loss less its exact mean: the best constant baseline but for the score's length."""

    def __call__(self, step: Step) -> Tensor:
        """The loss of the method, less that mean."""
        assert step.expected is not None
        mean = step.expected().detach()
        return self.method(dataclasses.replace(step, loss=lambda part: step.loss(part) - mean))


@dataclass(frozen=True)
class DrawnIdentity(Simple):
    """The identity straight-through estimator of an exact draw, not of perturbed scores."""

    def __call__(self, step: Step) -> Tensor:
        """The loss of the draw."""
        return step.of(straight_through(self._draw(step), step.scores))


def planted(seed: int, n: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Theta and b, as the notebooks of SIMPLE and of I-MLE draw them."""
    generator = np.random.RandomState(seed)
    theta = generator.randn(n)
    return theta, np.abs(generator.randn(n))


@dataclass(frozen=True)
class Given(SubsetToy):
    """The toy of one of those seeds, the same for all replicates."""

    numpy_seed: int = 0

    def teacher(self, noise: Noise) -> Teacher:
        """Its b."""
        return {"b": self._alike(noise, planted(self.numpy_seed, self.n)[1])}

    def start(self, noise: Noise) -> Tensor:
        """Its theta."""
        return self._alike(noise, planted(self.numpy_seed, self.n)[0]).unsqueeze(-1)

    def _alike(self, noise: Noise, numbers: np.ndarray) -> Tensor:
        like = noise("number of replicates", 1)
        return torch.as_tensor(numbers, dtype=like.dtype).expand(len(like), -1)


@dataclass(frozen=True)
class Quadratic(SubsetToy):
    """f(z) = z'Az + <c, z> + <c, z>^2 / 2 of a one-hot z; the fixture of a generator's seed 0."""

    n: int = 8
    k: int = 1

    def fixture(self) -> tuple[Tensor, Teacher]:
        """W and what is planted, one replicate."""
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.n,), (self.n, self.n), (self.n,))
        theta, A, c = (torch.randn(*each, generator=generator, dtype=torch.float64) for each in shapes)
        return theta[None, :, None], {"A": (A @ A.mT / self.n)[None], "c": c[None]}

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:  # noqa: ARG002
        """One x, 1; nothing to aim at."""
        x = torch.ones_like(teacher["c"][:, None, :1]).expand(-1, rows, 1)
        return Batch(x, x, teacher)

    def loss(self, part: Tensor, scores: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """The f of the class."""
        A, c = batch.teacher["A"], batch.teacher["c"].unsqueeze(1)
        linear = (part * c).sum(-1)
        return ((part @ A) * part).sum(-1) + linear + linear.square() / 2

    def population(self, teacher: Teacher) -> Batch:
        """The one row."""
        x = torch.ones_like(teacher["c"][:, None, :1])
        return Batch(x, x, teacher)

    def population_loss(self, W: Tensor, batch: Batch) -> Tensor:
        """The mean of f over the n one-hots."""
        ones = torch.eye(self.n, dtype=W.dtype).expand(len(W), -1, -1)
        return (self.probabilities(W) * self.loss(ones, ones, batch)).sum(-1)


def drawn(
    method: Method, task: SubsetToy, W: Tensor, teacher: Teacher, normals: Normals, count: int
) -> Tensor:
    """Gradients of one draw each, `(count, R, n)`."""
    chunks = []
    for start in range(0, count, AT_ONCE):
        m = min(AT_ONCE, count - start)
        batch = task.sample({name: copies(part, m) for name, part in teacher.items()}, normals, 1)
        grads = gradients(method, task, {WEIGHTS: copies(W, m)}, batch, Repeated(normals, m))[1]
        chunks.append(grads[WEIGHTS].unflatten(0, (m, len(W))).squeeze(-1))
    return torch.cat(chunks)


def by_cosine(grads: Tensor, truth: Tensor) -> dict[str, float]:
    """The three numbers of Ahmed et al. 2023, means over replicates.

    With gbar the mean of gradients g and g* the true one: bias = 1 - cos(gbar, g*), variance = Var cos(g,
    gbar), which is not a variance of gradients, error = mean (1 - cos(g, g*)).

    Args:
        grads: `(M, R, n)`.
        truth: `(R, n)`.
    """
    mean = grads.mean(0)
    cosine = torch.cosine_similarity
    return {
        "bias": (1 - cosine(mean, truth, dim=-1)).mean().item(),
        "variance": cosine(grads, mean, dim=-1).var(0).mean().item(),
        "error": (1 - cosine(grads, truth, dim=-1)).mean().item(),
    }


def by_size(
    method: Method, task: SubsetToy, W: Tensor, teacher: Teacher, normals: Normals, count: int
) -> dict[str, float]:
    """From `topkbench.gradients`, means over replicates: relative to the true gradient's norm or its square.

    `rel_bias` is |gbar - g*| / |g*| as it stands, with the noise of gbar in it, to compare with published
    numbers; `bias_z` is the squared bias without it, over its standard error.
    """
    truth = true_gradient(task, W, teacher, normals)
    columns = measure(method, task, W, teacher, normals, Sampling(1, count), truth=truth)
    noisy = (columns["rel_bias2"] + columns["rel_variance"] / count).sqrt()
    kept = ("rel_variance", "rel_mse", "cos_mean", "rho")
    return {
        "rel_bias": noisy.mean().item(),
        "bias_z": (columns["rel_bias2"] / columns["rel_bias2_se"]).mean().item(),
        **{name: columns[name].mean().item() for name in kept},
    }
