"""Who runs in `speed.py` besides the public packages: torch.topk, every operator and some methods of ours.

A contender turns (scores, k) into a call that runs forward and backward once. What it prepares beforehand
(networks, compilation) is not timed.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import topkbench.operators
from topkbench import topk_mask
from topkbench.choices import available
from topkbench.config import built
from topkbench.methods import Step
from topkbench.operators import Operator, perturbed_mask

SEEDS = itertools.count(1)
FRESH, SMALL = 64, 1 << 17  # drawings of the scores, where there are no more than so many
Function = Callable[[Tensor], Tensor]
BASE = "torch.topk"
METHODS = ("blackbox", "imle", "simple")
COMPILED = ("entropic", "lapsum", "gaussian", "cauchy", "sparsemax", "pnorm", "csoftmax")


@dataclass(frozen=True)
class Call:
    """Forward and backward once.

    Attributes:
        run: Does it.
        given: Bytes of the scores and of the incoming gradient, which are there before.
        held: Its peak memory in bytes, where that is known beforehand.
    """

    run: Callable[[], object]
    given: int = 0
    held: int | None = None

    def __call__(self) -> None:
        """Run."""
        self.run()


@dataclass(frozen=True)
class Contender:
    """A name in the table.

    Attributes:
        kind: "torch", "ours", "compiled" or "peer".
        make: (scores, k) -> call.
        package: What it needs.
        devices: Where it runs.
    """

    kind: str
    make: Callable[[Tensor, int], Call]
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")


def by_autograd(function_of: Callable[[Tensor, int], Function]) -> Callable[[Tensor, int], Call]:
    """A call from what builds a function of the scores, for scores like these and k."""

    def make(scores: Tensor, k: int) -> Call:
        function = function_of(scores, k)
        # The same for nobody: who comes second would find the way prepared.
        generator = torch.Generator(scores.device).manual_seed(next(SEEDS))
        out = function(scores.detach().requires_grad_())
        upstream = torch.empty_like(out, requires_grad=False).normal_(generator=generator)
        del out
        # Fresh scores at every call, as in training: a processor learns the branches of a top-k by heart.
        several = FRESH if scores.numel() <= SMALL else 1
        draws = itertools.cycle(
            [torch.empty_like(scores).normal_(generator=generator) for _ in range(several)]
        )

        def run() -> None:
            leaf = next(draws).detach().requires_grad_()
            torch.autograd.grad(function(leaf), leaf, upstream)

        return Call(run, scores.nbytes + upstream.nbytes)

    return make


# torch and ours


def _by_hand(_like: Tensor, k: int) -> Function:
    def straight_through(s: Tensor) -> Tensor:
        soft = s.softmax(-1)
        hard = torch.zeros_like(s).scatter(-1, s.topk(k).indices, 1.0)
        return hard + (soft - soft.detach())

    return straight_through


def _gumbel(_like: Tensor, _k: int) -> Function:
    return lambda s: torch.nn.functional.gumbel_softmax(s, hard=True)


TORCH = {
    BASE: Contender("torch", by_autograd(lambda _, k: lambda s: s.topk(k).values)),
    "torch.sort": Contender("torch", by_autograd(lambda *_: lambda s: s.sort().values)),
    "straight-through softmax by hand": Contender("torch", by_autograd(_by_hand)),
    "torch gumbel_softmax (k=1)": Contender("torch", by_autograd(_gumbel)),
}


def _operator(op: Operator) -> Contender:
    return Contender("ours", by_autograd(lambda _, k: lambda s: op(s, k, 1.0)))


def _compiled(op: Operator) -> Contender:
    """Forward and backward each as one compiled graph."""

    def function(_like: Tensor, k: int) -> Function:
        return torch.compile(lambda s: op(s, k, 1.0), fullgraph=True, dynamic=False)

    return Contender("compiled", by_autograd(function))


def _noise_like(scores: Tensor) -> Callable[..., Tensor]:
    """Draws of the laws a method asks for, all from torch's own generator: the quickest a caller can be."""

    def noise(_name: str, *shape: int, law: str = "normal", a: float = 1.0) -> Tensor:
        empty = torch.empty((1, *shape), dtype=scores.dtype, device=scores.device)
        if law == "normal":
            return empty.normal_()
        if law == "uniform":
            return empty.uniform_()
        if law == "gamma":
            return torch._standard_gamma(empty.fill_(a))
        exponential = empty.exponential_()
        return -exponential.log() if law == "gumbel" else exponential

    return noise


def _method(name: str) -> Contender:
    """A file of conf/method, on a loss that is linear in the mask."""

    def function(like: Tensor, k: int) -> Function:
        method = built("method", name)
        weight = torch.linspace(-1, 1, like.shape[-1], dtype=like.dtype, device=like.device)
        noise = _noise_like(like)

        def loss(scores: Tensor) -> Tensor:
            rows = scores.unsqueeze(0)
            return method(Step(rows, rows, rows, k, "mask", lambda z: z @ weight, noise))

        return loss

    return Contender("ours", by_autograd(function))


def _gumbel_subset(_like: Tensor, k: int) -> Function:
    """Successive softmax of noisy scores, as in `+method=gumbel_softmax`."""

    def function(s: Tensor) -> Tensor:
        noise = torch.empty_like(s, requires_grad=False).uniform_().clamp_(min=2.0**-25).log_().neg_().log_()
        return topkbench.operators.softmax(s - noise, k, 1.0)

    return function


FUNCTIONS = {
    "topk_mask ste_scaled_softmax": lambda _, k: lambda s: topk_mask(s, k, "ste_scaled_softmax"),
    "perturbed_mask": lambda _, k: lambda s: perturbed_mask(s, k),
    "perturbed_mask antithetic": lambda _, k: lambda s: perturbed_mask(s, k, antithetic=True),
    "softmax + Gumbel noise": _gumbel_subset,
}


def ours(compiled: bool) -> dict[str, Contender]:
    """Every operator, the methods that are there, and the compiled threshold operators if asked for."""
    operators = {name: op for name, op in vars(topkbench.operators).items() if isinstance(op, Operator)}
    found = {name: _operator(op) for name, op in operators.items()}
    found |= {name: Contender("ours", by_autograd(function)) for name, function in FUNCTIONS.items()}
    found |= {f"method {name}": _method(name) for name in METHODS if name in available("method")}
    if compiled:
        found |= {f"{name} compiled": _compiled(operators[name]) for name in COMPILED if name in operators}
    return found
