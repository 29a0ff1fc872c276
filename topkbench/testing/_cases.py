"""Where the checks look: scores, k and temperatures from fixed seeds, and how numbers are compared."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from topkbench.operators import Operator

Part = Callable[..., Tensor]
SEPARATED = torch.tensor([0.2, -1.0, 1.0, -0.6, 0.6, -0.2], dtype=torch.float64)


class Case(NamedTuple):
    scores: Tensor
    k: int
    temperature: float | Tensor

    def __str__(self) -> str:
        return f"scores={self.scores.tolist()}, k={self.k}, temperature={self.temperature}"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counts(n: int) -> list[int]:
    return sorted({k for k in (1, 2, n - 1, n) if 1 <= k <= n})


def cases(ties: bool = True) -> Iterator[Case]:
    """Ordinary and widely spread rows, with `ties` also equal and half equal ones; n = 1 included."""
    for n in (1, 2, 6):
        pairs = (torch.arange(n, dtype=torch.float64) % 2).expand(1, n)
        equal = [torch.zeros_like(pairs), pairs] if ties else []
        scores = torch.cat([draw(3, n), 100 * draw(1, n, seed=1), *equal])
        for k, temperature in product(counts(n), (0.1, 1.0, 10.0)):
            yield Case(scores, k, temperature)


def parts(operator: Operator) -> dict[str, Part]:
    return {"mask": operator, "selection": operator.selection, "values": operator.values}


def outcomes_of(operator: Operator, case: Case) -> dict[str, Tensor]:
    """Mask, selection and values, and the gradient of the sum of squares of each."""
    outcomes = {}
    for name, part in parts(operator).items():

        def square(scores: Tensor, part: Part = part) -> tuple[Tensor, Tensor]:
            output = part(scores, case.k, case.temperature)
            return output.square().sum(), output

        # torch.func and not backward(), so that this also runs under vmap.
        gradient, outcomes[name] = torch.func.grad(square, has_aux=True)(case.scores)
        outcomes[f"gradient of the {name}"] = gradient
    return outcomes


def close(actual: Tensor, expected: Tensor, what: str, case: Case, *, tol: float = 1e-9) -> None:
    """The default is far above rounding in float64 and leaves room for a solver that stops at a tolerance."""
    text = f"{what} at {case}\n"
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, msg=lambda detail: text + detail)


def require(condition: Tensor | bool, what: str, case: Case) -> None:
    if not torch.as_tensor(condition).all():
        raise AssertionError(f"{what} at {case}")
