"""Our estimators against public packages' own, on the same noise; faults of packages. See test_peers.py."""

import peers
import pytest
import torch
from entmax import budget_bisect  # 1.3
from peers import close, draw, outcome

from topkbench.methods import Step
from topkbench.methods.implicit import BlackBox, ImplicitMLE
from topkbench.methods.subset import ReinMaxK
from topkbench.operators.perturbed import perturbed_mask

ROUNDING = 1e-11  # some hundred roundings of a double
GUARDED = 1e-6  # pyepo adds 1e-7 to what it divides by


def step(scores, k, loss, noise):
    nothing = scores.new_zeros(1, *scores.shape[1:])[..., :1]
    return Step(nothing.new_zeros(1, scores.shape[-1], 1), nothing, scores, k, "mask", loss, noise)


def estimate(method, scores, k, weights, noise):
    """The loss `<z, weights>` of each row and its gradient."""
    leaf = scores.clone().unsqueeze(0).requires_grad_()
    losses = method(step(leaf, k, lambda z: (z * weights).sum(-1), noise))
    return losses.detach()[0], torch.autograd.grad(losses.sum(), leaf)[0][0]


def packaged(function, scores, weights):
    leaf = scores.clone().requires_grad_()
    losses = (function(leaf) * weights).sum(-1)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_perturbed_pyepo(k):
    pyepo = pytest.importorskip("pyepo")
    scores, samples, temperature = draw(3, 6), 7, 0.5
    theirs = pyepo.func.perturbedOpt(peers.pyepo_solver(6, k), n_samples=samples, sigma=temperature, seed=4)
    drawn = torch.randn((3, samples, 6), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = outcome(
        lambda s: perturbed_mask(s, k, temperature, samples=samples, noise=drawn.movedim(1, 0)), scores
    )
    close(ours, outcome(theirs, scores), GUARDED)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_perturbed_optax(k):
    pytest.importorskip("optax")
    scores, samples = draw(3, 6), 7
    theirs, draws = peers.optax_perturbed(samples)
    ours = outcome(
        lambda s: perturbed_mask(s, k, 0.5, samples=samples, centred=False, noise=draws(s)), scores
    )
    close(ours, outcome(theirs, scores, k, 0.5), ROUNDING)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_implicit_mle_pyepo(k, symmetric):
    pyepo = pytest.importorskip("pyepo")
    scores, weights, samples = draw(3, 6), draw(3, 6, seed=1), 7
    noise = draw(3, samples, 6, seed=2)

    class Given:
        def sample(self, **_):
            return noise

    options = {"n_samples": samples, "sigma": 0.5, "lambd": 2.0, "distribution": Given()}
    module = pyepo.func.implicitMLE(peers.pyepo_solver(6, k), two_sides=symmetric, **options)
    method = ImplicitMLE(strength=2.0, noise="normal", scale=0.5, samples=samples, symmetric=symmetric)
    ours = estimate(method, scores, k, weights, lambda *_, **__: noise.movedim(1, 0).unsqueeze(0))
    assert ours[1].any()
    close(ours, packaged(module, scores, weights), GUARDED)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_black_box_pyepo(k):
    pyepo = pytest.importorskip("pyepo")
    scores, weights = draw(3, 6), draw(3, 6, seed=1)
    module = pyepo.func.blackboxOpt(peers.pyepo_solver(6, k), lambd=2.0)
    ours = estimate(BlackBox(strength=2.0), scores, k, weights, lambda *_, **__: None)
    assert ours[1].any()
    close(ours, packaged(module, scores, weights), GUARDED)


def test_reinmax_at_k_1(monkeypatch):
    """Both draw for themselves; theirs is made to draw what ours drew."""
    package = pytest.importorskip("reinmax")
    scores, weights = draw(40, 6), draw(40, 6, seed=1)
    uniforms = torch.rand(1, 40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    taken = []

    def loss(z):
        taken.append(z.detach().argmax(-1))
        return (z * weights).sum(-1)

    leaf = scores.clone().unsqueeze(0).requires_grad_()
    losses = ReinMaxK(temperature=1.0)(step(leaf, 1, loss, lambda *_, **__: uniforms))
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    index = taken[0][0].unsqueeze(-1)
    assert len(index.unique()) > 2
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: index)
    theirs = packaged(lambda s: package.reinmax(s, 1.0)[0], scores, weights)
    close((losses.detach()[0], gradient[0]), theirs, ROUNDING)


# Faults of packages, so that nobody takes them for ours. A test that fails says that one has been mended.


def test_entmax_budget_bisect_takes_the_last_dimension_as_minus_1_only():
    scores = draw(4, 3).requires_grad_()
    mask = budget_bisect(scores, budget=2, dim=1)
    with pytest.raises(IndexError):
        mask.sum().backward()


def test_entmax_budget_bisect_is_silently_wrong_where_the_dimension_before_is_1():
    scores = draw(2, 4)
    _, right = outcome(lambda s: budget_bisect(s, budget=2, dim=-1), scores)
    _, wrong = outcome(lambda s: budget_bisect(s, budget=2, dim=-1), scores.unsqueeze(1))
    assert (wrong.squeeze(1) - right).abs().max() > 0.1


def test_difftopk_neuralsort_fails_in_double_precision():
    pytest.importorskip("difftopk")  # 0.2.0
    with pytest.raises(RuntimeError, match="dtype"):
        peers.difftopk_neuralsort(draw(2, 4), 1, 1.0)


def test_colt5_stops_before_its_sum_is_k():
    package = pytest.importorskip("colt5_attention.coor_descent")  # 0.11.2
    total = package.coor_descent(draw(4, 6), n_iters=20, k=3, eps=0.1).sum(-1)
    assert ((total - 3).abs() > 1e-3).any()
