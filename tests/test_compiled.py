"""Every operator under Inductor, the compiler that is used, against the same operator not compiled.

Compiling takes long, so these tests run only where asked for:

    pytest -m compiled tests/test_compiled.py

Each operator is compiled four times: all of it; the mask alone, of more scores; with k at its ends; and the
mask of a single row. One graph of all that takes several times as long to compile. A family has a process of
its own, as the compiler cannot look through the checks of signatures that tests run under: `python
tests/test_compiled.py entropic dftopk:mask` does the same for the operators, or graphs of them, that are
named, and prints what it finds.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench import operators
from topkbench.operators import Operator

pytestmark = pytest.mark.compiled

OPERATORS = {name: thing for name, thing in vars(operators).items() if isinstance(thing, Operator)}
LAYERED = {"subset distribution"}  # their graphs grow with the number of scores
TEMPERATURE = 0.5
Graph = Callable[[Operator, Tensor], dict[str, Tensor]]
TOLERANCE = 1e-5  # of the largest entry; in single precision, and eager may stop when it has converged
ROUNDING = 1e-6  # for what ought to be 0, made of numbers of the order of 1


def mask(op: Operator, scores: Tensor) -> dict[str, Tensor]:
    return {"mask": op(scores, 8, TEMPERATURE)}


def parts(op: Operator, scores: Tensor) -> dict[str, Tensor]:
    return {
        "mask": op(scores, 3, TEMPERATURE),
        "selection": op.selection(scores, 3, TEMPERATURE),
        "values": op.values(scores, 3, TEMPERATURE),
    }


def ends(op: Operator, scores: Tensor) -> dict[str, Tensor]:
    n = scores.shape[-1]
    return {
        "mask, k = 1": op(scores, 1, TEMPERATURE),
        "mask, k = n": op(scores, n, TEMPERATURE),
        "selection, k = n": op.selection(scores, n, TEMPERATURE),
        "values, k = n": op.values(scores, n, TEMPERATURE),
    }


def row(op: Operator, scores: Tensor) -> dict[str, Tensor]:
    return {"mask": op(scores, 3, TEMPERATURE)}


GRAPHS = {parts: (4, 9), mask: (2, 64), ends: (4, 5), row: (1, 6)}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outcomes(function: Callable[[Tensor], dict[str, Tensor]], scores: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every output, and the gradient of a random linear function of it alone."""
    for name in function(scores):
        leaf = scores.clone().requires_grad_()
        output = function(leaf)[name]
        yield name, output.detach()
        (grad,) = torch.autograd.grad((output * draw(*output.shape, seed=9)).sum(), leaf)
        yield f"gradient of the {name}", grad


def share(ours: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of what is allowed; infinite where one of the two is not finite."""
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    allowed = max(TOLERANCE * expected.abs().max().item(), ROUNDING)
    return ((ours - expected).abs() / allowed).nan_to_num(torch.inf, torch.inf).max().item()


def same(name: str, graph: Graph) -> bool:
    """Compile an operator and print each difference; whether all are allowed."""
    torch._dynamo.reset()
    op = OPERATORS[name]
    rows, n = GRAPHS[graph]
    shape = (rows, min(n, 16) if op.about.family in LAYERED else n)
    plain = partial(graph, op)
    compiled = torch.compile(plain, backend="inductor", fullgraph=True, dynamic=False)
    shares = []
    for seed in (0, 1):  # the second draw by what was compiled for the first
        scores = draw(*shape, seed=seed)
        for (what, ours), (_, expected) in zip(
            outcomes(compiled, scores), outcomes(plain, scores), strict=True
        ):
            shares.append(share(ours, expected))
            print(f"{name} {shape}, draw {seed}, {what}: {shares[-1]:.3f} of what is allowed", flush=True)
    return max(shares) <= 1


def named(word: str) -> list[str]:
    """The graphs that "operator" or "operator:graph" means, as "operator:graph"."""
    return [word] if ":" in word else [f"{word}:{graph.__name__}" for graph in GRAPHS]


def cases() -> Iterator[Any]:
    for family in dict.fromkeys(op.about.family for op in OPERATORS.values()):
        words = [word for name, op in OPERATORS.items() if op.about.family == family for word in named(name)]
        yield pytest.param(words, id=family)


@pytest.fixture(scope="module")
def _a_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("Inductor finds no C++ compiler: g++, or what the environment variable CXX names")


@pytest.mark.usefixtures("_a_compiler")
@pytest.mark.parametrize("words", list(cases()))
def test_the_same_as_not_compiled(words):
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


CHANGING = """
import torch
from topkbench.operators import entropic, pnorm, soft, soft_sorted, splitter
from topkbench.operators.magnitude import magnitude
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
changes = [(4, 20, 3, 0.5), (4, 20, 5, 0.5), (4, 20, 6, 0.7), (5, 30, 6, 0.9), (1, 20, 6, 0.9)]
options = {pnorm: {"p": 1.3}, magnitude: {"p": 1.3}, soft: {"iterations": 9}}
for op in (entropic, pnorm, magnitude, soft, soft_sorted, splitter):
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    calls = [(draw(rows, n), k, temperature, {}) for rows, n, k, temperature in changes]
    for scores, k, temperature, more in [*calls, (*calls[0][:3], options.get(op, {}))]:
        expected = op(scores, k, temperature, **more)
        torch.testing.assert_close(compiled(scores, k, temperature, **more), expected, rtol=1e-8, atol=1e-8)
    # Where a row is all there is, its strides mean nothing.
    for scores in (draw(6), draw(1, 6), draw(1, 1, 20), draw(6, 4).T):
        torch._dynamo.reset()
        alone = torch.compile(op, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(alone(scores, 3, 0.5), op(scores, 3, 0.5), rtol=1e-8, atol=1e-8)
    batch, many = draw(3, 4, 20), torch.vmap(lambda scores: op(scores, 3, 0.5))
    compiled = torch.compile(many, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), many(batch), rtol=1e-8, atol=1e-8)
    torch._dynamo.reset()
    print(op.__name__)
"""


def test_compiled_for_numbers_that_change_and_for_single_rows():
    """A compiler makes variables of numbers that change from call to call, which loops may not look at."""
    done = subprocess.run([sys.executable, "-c", CHANGING], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["splitter"], done.stdout + done.stderr[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    graphs = {graph.__name__: graph for graph in GRAPHS}
    wrong = []
    for word in chain.from_iterable(map(named, sys.argv[1:])):
        name, graph = word.split(":")
        if not same(name, graphs[graph]):
            wrong.append(word)
    sys.exit(f"not the same as without the compiler: {', '.join(wrong)}" if wrong else 0)
