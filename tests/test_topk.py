"""The operators as a library: one call, per-row k, half precision, autocast, compilation, checks by value."""

import subprocess
import sys

import jaxtyping
import pytest
import torch

from topkbench import operators, topk_mask
from topkbench.operators import Operator, hard_mask
from topkbench.operators import _threshold as solver
from topkbench.topk import methods

OPERATORS = {name: thing for name, thing in vars(operators).items() if isinstance(thing, Operator)}
THRESHOLD = [name for name, op in OPERATORS.items() if op.about.family == "threshold"]
every = pytest.mark.parametrize("name", OPERATORS)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def no_signature_checks(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_every_operator_is_a_method():
    assert {*OPERATORS, "hard", "perturbed"} == set(methods())


@pytest.mark.parametrize("name", [*OPERATORS, "hard", "perturbed"])
def test_a_mask_by_name(name):
    scores = draw(3, 6)
    mask = topk_mask(scores, 2, name, 0.5)
    assert mask.shape == scores.shape
    if name in OPERATORS:
        assert torch.equal(mask, OPERATORS[name](scores, 2, 0.5))


@every
def test_straight_through_is_hard_with_the_gradient_of_the_operator(name):
    scores, g = draw(3, 6).requires_grad_(), draw(3, 6, seed=1)
    through, soft = topk_mask(scores, 2, f"ste_{name}", 0.5), topk_mask(scores, 2, name, 0.5)
    torch.testing.assert_close(through, hard_mask(scores, 2), rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((mask * g).sum(), scores)[0] for mask in (through, soft)]
    assert torch.equal(*grads)


def test_the_plain_straight_through_estimator():
    scores, g = draw(3, 6).requires_grad_(), draw(3, 6, seed=1)
    (topk_mask(scores, 2, "ste") * g).sum().backward()
    assert torch.equal(scores.grad, g)


def test_options_reach_the_operator():
    scores = draw(3, 6)
    mask = topk_mask(scores, 2, "entmax", alpha=2.0)
    torch.testing.assert_close(mask, topk_mask(scores, 2, "sparsemax"))
    with pytest.raises(TypeError, match="alhpa"):
        topk_mask(scores, 2, "entmax", alhpa=2.0)
    with pytest.raises(ValueError, match=r"alpha must be in \(1, 2\], got 1"):
        topk_mask(scores, 2, "entmax", alpha=1.0)


def test_unknown_methods_are_refused_with_the_nearest():
    for given, near in (("entropc", "entropic"), ("ste_sparsmax", "sparsemax")):
        with pytest.raises(ValueError, match=f"unknown method '{given}'; did you mean {near}"):
            topk_mask(draw(3, 6), 2, given)


@pytest.mark.usefixtures("no_signature_checks")
@pytest.mark.parametrize("name", ["entropic", "hard", "softmax", "perturbed"])
def test_numbers_are_looked_at_where_asked(name):
    scores, nan = draw(3, 6), draw(3, 6)
    nan[1, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^scores hold 1 NaN, the first at index \(1, 4\)$"):
        topk_mask(nan, 2, name, check=True)
    with pytest.raises(ValueError, match=r"^k must be in \[1, 6\] for 6 scores, got 0 to 7$"):
        topk_mask(scores, torch.tensor([0, 3, 7]), name, check=True)
    with pytest.raises(ValueError, match=r"^temperature must be > 0, got -1\.0 among its values$"):
        topk_mask(scores, 2, name, torch.tensor([[1.0], [-1.0], [0.5]]), check=True)
    assert topk_mask(nan, 2, name).shape == nan.shape


@pytest.mark.usefixtures("no_signature_checks")
@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (torch.tensor([1, 2, 7]), ValueError, r"^k must be in \[1, 6\] for 6 scores, got 1 to 7$"),
        (torch.tensor([1, 2]), ValueError, r"^k must broadcast over rows: .* \(3, 6\), got shape \(2,\)$"),
        (
            torch.tensor([1.0, 2, 3]),
            TypeError,
            r"^k must be an int or a tensor of whole numbers, got torch\.",
        ),
    ],
)
def test_bad_tensors_k(k, error, message):
    for op in OPERATORS.values():
        with pytest.raises(error, match=message):
            op(draw(3, 6), k)
    with pytest.raises(TypeError, match=r"^a selection has k rows: k must be an int, got a tensor of shape"):
        operators.entropic.selection(draw(3, 6), torch.tensor([1, 2, 3]))


@pytest.mark.usefixtures("no_signature_checks")
def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^'ste_hard': hard is no relaxation; ste_ stands before an oper"):
        topk_mask(draw(3, 6), 2, "ste_hard")
    with pytest.raises(TypeError, match=r"^k must be an int for perturbed top-k, got a tensor of shape"):
        topk_mask(draw(3, 6), torch.tensor([1, 2, 3]), "perturbed")
    with pytest.raises(ValueError, match=r"a selection of scores \(64, 100000\) takes 23\.8 GiB"):
        operators.entropic.selection(torch.empty(64, 10**5), 1000)


def test_a_masked_score_does_not_spoil_straight_through():
    scores = torch.tensor([1.0, -torch.inf, 0.0], requires_grad=True)
    mask = topk_mask(scores, 1, "ste")
    mask[0].backward()
    assert mask.tolist() == scores.grad.tolist() == [1, 0, 0]


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    scores = draw(4, 8).to(dtype)
    mask = topk_mask(scores, 3, name, 0.5)
    assert mask.dtype == dtype
    assert torch.equal(mask, topk_mask(scores.float(), 3, name, 0.5).to(dtype))


@every
def test_autocast_leaves_float32_alone(name):
    scores = draw(4, 8).float().requires_grad_()
    plain = OPERATORS[name](scores, 3, 0.5), OPERATORS[name].values(scores, 3, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = (scores @ torch.eye(8)).detach()
        assert coarse.dtype == torch.bfloat16
        assert topk_mask(coarse, 3, name, 0.5).dtype == torch.float32
        cast = OPERATORS[name](scores, 3, 0.5), OPERATORS[name].values(scores, 3, 0.5)
        (grad,) = torch.autograd.grad(cast[0].square().sum(), scores)
    assert all(torch.equal(*pair) for pair in zip(plain, cast, strict=True))
    assert grad.dtype == torch.float32


COMPILED = """
import sys, torch
from topkbench import operators
scores = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
for name in sys.argv[1:]:
    op, outcomes = getattr(operators, name), []
    plain = lambda s: op(s, 3, 0.5)
    for function in (torch.compile(plain, fullgraph=True, backend="aot_eager"), plain):
        leaf = scores.clone().requires_grad_()
        mask = function(leaf)
        mask.square().sum().backward()
        outcomes.append((mask.detach(), leaf.grad))
    for ours, expected in zip(*outcomes):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)
    torch._dynamo.reset()
    print(name)
"""


def test_compiles_without_a_break():
    """In another process: the compiler cannot look through the checks of signatures that tests run under."""
    done = subprocess.run([sys.executable, "-c", COMPILED, *OPERATORS], capture_output=True, text=True)
    assert done.stdout.split() == list(OPERATORS), done.stderr[-3000:]


def test_the_network_that_inductor_made_zeros_of():
    """When it followed the layers of the splitter, without a word."""
    compiled = COMPILED.replace("aot_eager", "inductor")
    done = subprocess.run([sys.executable, "-c", compiled, "splitter"], capture_output=True, text=True)
    assert done.stdout.split() == ["splitter"], done.stderr[-3000:]


@pytest.mark.parametrize("name", THRESHOLD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_as_many_steps_as_an_accelerator_makes_are_enough(name, dtype, monkeypatch):
    """Where nobody may look whether it has converged, a fixed number of steps must do."""
    monkeypatch.setattr(solver, "readable", lambda _: False)
    for n, k in ((2, 1), (64, 8), (300, 1), (300, 299), (1000, 10)):
        for temperature in (0.01, 0.1, 1.0, 10.0):
            for power in (1, 3):
                total = OPERATORS[name](draw(20, n).pow(power).to(dtype), k, temperature).sum(-1)
                expected = torch.full_like(total, k)
                tol = 1e-8 if dtype == torch.float64 else 2e-5
                torch.testing.assert_close(total, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", THRESHOLD)
def test_exactness_of_many_scores_in_single_precision(name):
    """The sum to 1e-5 at n = 10^6, the mask to 1e-6 of that in float64 at n = 1,000."""
    scores = draw(1, 10**6).float()
    total = OPERATORS[name](scores, 1000).double().sum()
    torch.testing.assert_close(total, torch.tensor(1e3, dtype=torch.float64), rtol=1e-5, atol=0)
    scores = draw(20, 1000)
    for k in (1, 50, 500):
        mask = OPERATORS[name](scores.float(), k).double()
        precise = OPERATORS[name](scores.float().double(), k)
        largest = max(1.0, precise.max().item())  # of an uncapped one
        torch.testing.assert_close(mask, precise, rtol=0, atol=1e-6 * largest)


def test_a_row_of_nan_does_not_hold_up_the_solver():
    nan = torch.full((2, 5), torch.nan)
    assert operators.entropic(nan, 2).isnan().all()


@every
def test_k_may_be_that_of_each_replicate(name):
    """(R, 1) against (R, B, n), and a temperature (R, 1, 1), as in a training loop."""
    scores, k = draw(3, 4, 6), torch.tensor([[1], [3], [5]])
    temperature = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    masks = OPERATORS[name](scores, k, temperature)
    for r, count in enumerate((1, 3, 5)):
        alone = OPERATORS[name](scores[r], count, temperature[r, 0, 0].item())
        torch.testing.assert_close(masks[r], alone, rtol=1e-9, atol=1e-9)
