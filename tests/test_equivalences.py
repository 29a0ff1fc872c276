"""Published relaxations, as their papers write them, are the operators they are said to be."""

import importlib.util
from pathlib import Path

import pytest
import torch

from topkbench import operators
from topkbench.testing import published


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "experiments" / "equivalences.py"
    spec = importlib.util.spec_from_file_location("equivalences", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(script):
    return script.random_rows(60, seed=1)


def apart(script, rows, one, other):
    return script.difference(script.outcome(one, rows), script.outcome(other, rows))


def test_every_published_form_is_the_operator_it_is_listed_under(script, rows):
    table = script.differences(rows)
    assert (table[["forward difference", "gradient difference"]] < 1e-6).all(axis=None), table.to_string()


def test_all_published_forms_are_listed(script):
    own = [f for f in vars(published).values() if getattr(f, "__module__", None) == published.__name__]
    listed = [form.function for form in script.PUBLISHED]
    assert len(listed) == len(set(listed)) == len(own)
    assert set(listed) == set(own)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (published.lml, lambda s, k, t: operators.entropic(s, k, 2 * t)),
        (published.permutahedron, lambda s, k, t: operators.sparsemax(s, k, 2 * t)),
        (published.lapsum, operators.entropic),
        (published.coordinate_descent, operators.sparsemax),
        # The law of k-subsets has marginals that are not those of independent ones with the same sum.
        (published.dp_shannon, operators.entropic),
        (published.sander, lambda s, k, t: operators.pnorm(s, k, t, p=4 / 3)),
    ],
)
def test_operators_that_differ_are_told_apart(script, rows, one, other):
    assert min(apart(script, rows, one, other)) > 1e-3


def test_a_wrong_gradient_alone_is_seen(script, rows):
    def held(s, k, t):
        return published.lml(s.detach(), k, t) + 0 * s

    forward, gradient = apart(script, rows, held, operators.entropic)
    assert forward < 1e-6
    assert gradient > 1e-3


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_stated_gradients_are_derivatives(script, k):
    """Of the papers' own vector-Jacobian products: finite differences of their forward passes."""
    scores = torch.randn(5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    for form in script.PUBLISHED:
        leaf = scores.clone().requires_grad_()

        def function(s, form=form):
            return form.function(s, k, 0.7)

        # Iterations end at 1e-14 of their fixed point, over a step of 1e-5.
        assert torch.autograd.gradcheck(function, leaf, eps=1e-5, rtol=1e-5, atol=1e-6), form.name
