"""The operators against the contract, references and identities; the checks against broken operators."""

import dataclasses

import jaxtyping
import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identities import IDENTITIES

import topkbench.operators
from topkbench import testing
from topkbench.operators import (
    Guarantees,
    Operator,
    entropic,
    hard_mask,
    hard_selection,
    hard_values,
    operator,
    sparsemax,
)
from topkbench.operators.hard import hard_mask_of_data

OPERATORS = {name: thing for name, thing in vars(topkbench.operators).items() if isinstance(thing, Operator)}
MASK_ONLY = {name: op for name, op in OPERATORS.items() if not op.has_rows}
THRESHOLD = {name: op for name, op in MASK_ONLY.items() if op.about.family == "threshold"}
SMOOTH = {
    name: op
    for name, op in OPERATORS.items()
    if op.about.family in ("threshold", "softmax", "subset distribution") and not op.guarantees.sparse
}
HARD = (hard_mask, hard_selection, hard_values)


def over(operators):
    return pytest.mark.parametrize("op", operators.values(), ids=operators.keys())


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol):
    if isinstance(expected, np.ndarray):
        expected = expected.copy()  # torch takes no negative strides
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# The contract


@pytest.mark.parametrize(
    ("check", "op"),
    [
        pytest.param(check, op, id=f"{name}-{check.__name__}")
        for name, op in OPERATORS.items()
        for check in testing.checks(op)
    ],
)
def test_contract(check, op):
    check(op)


@pytest.mark.parametrize(
    ("check", "op"),
    [
        pytest.param(check, op, id=f"{name}-{guarantee}")
        for name, op in OPERATORS.items()
        for guarantee, check in testing.GUARANTEED.items()
        if not getattr(op.guarantees, guarantee)
    ],
)
def test_what_is_not_guaranteed_does_not_hold(check, op):
    with pytest.raises(AssertionError, match="temperature="):
        check(op)


def test_every_check_is_run():
    assert set(testing.GUARANTEED) == {field.name for field in dataclasses.fields(Guarantees)}
    defined = {f for name, f in vars(testing).items() if name.startswith("check_")}
    parts = {testing.check_operator, testing.check_infinite, testing.check_masked}
    assert defined - parts == {*testing.GUARANTEED.values(), *testing.ALWAYS}


def test_check_operator_fails_where_a_check_does():
    with pytest.raises(AssertionError, match="mask does not sum to k"):
        testing.check_operator(operator()(lambda s, k, t: 1.001 * mask_of(s, k, t)))


# References


@over(OPERATORS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_reference_on_a_grid(op, n, temperature):
    rows = torch.cat([draw(3, n), 20 * draw(1, n)])
    if op.guarantees.ties:
        rows = torch.cat([rows, torch.zeros(1, n), draw(1, n).round()])
    for k in range(1, n + 1):
        expected = [references.selection(op.__name__, row, k, temperature) for row in rows.numpy()]
        # Successive softmax may amplify a rounding by 1 / temperature at each of its k - 1 steps.
        close(op.selection(rows, k, temperature), np.array(expected), tol=1e-9)
        close(op(rows, k, temperature), np.sum(expected, axis=-2), tol=1e-9)


@st.composite
def rows(draw):
    """Scores with and without ties, k, and a temperature."""
    entry = st.floats(-100, 100, allow_subnormal=False) | st.integers(-8, 8).map(lambda i: i / 4)
    scores = np.array(draw(st.lists(entry, min_size=1, max_size=8)))
    exponent = draw(st.floats(-0.7, 2))
    return scores, draw(st.integers(1, len(scores))), 10**exponent


@over(OPERATORS)
@given(row=rows())
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
def test_reference_on_drawn_scores(op, row):
    scores, k, temperature = row
    expected = references.selection(op.__name__, scores, k, temperature)
    # As above: rounding of scores / temperature < 1e-13, times at most (1 + 1 / 0.2)^7.
    close(op.selection(torch.tensor(scores), k, temperature), expected, tol=1e-7)


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: identity.name)
def test_identity(identity):
    for seed in range(3):
        scores = draw(identity.n, seed=seed)
        close(identity.left(scores), identity.right(scores), tol=1e-10)
        left = torch.autograd.functional.jacobian(identity.left, scores)
        close(left, torch.autograd.functional.jacobian(identity.right, scores), tol=1e-10)


# What is not in the contract


@over(MASK_ONLY)
def test_k_of_each_row(op):
    scores, temperature = draw(2, 3, 5).requires_grad_(), 0.3 + draw(3, 1, seed=1).abs()
    for k in (torch.tensor([1, 4, 5]), torch.tensor([[1], [5]]), torch.tensor([[1, 2, 3], [4, 5, 1]])):
        masks = op.function(scores, k, temperature)
        for index, count in np.ndenumerate(k.expand(2, 3).numpy()):
            row = scores[index]
            alone = op(row, int(count), temperature[index[1]])
            close(masks[index], alone, tol=1e-12)
            (gradient,) = torch.autograd.grad(masks[index].square().sum(), scores, retain_graph=True)
            (expected,) = torch.autograd.grad(alone.square().sum(), scores)
            close(gradient, expected, tol=1e-12)


@over(THRESHOLD)
@pytest.mark.parametrize(("spread", "power"), [(0.1, 1), (3, 1), (10, 3)])
def test_solver_converges_on_many_scores(op, spread, power):
    scores = spread * draw(50, 300) ** power
    for k in (1, 2, 150, 299):
        close(op(scores, k).sum(-1), torch.full((50,), k), tol=1e-12)


@over(THRESHOLD)
@pytest.mark.parametrize(("shape", "k"), [((50, 30), 7), ((2, 3, 400), 20), ((2000,), 100)])
def test_large_tensors_are_worked_on_in_pieces_with_the_same_outcome(op, shape, k, monkeypatch):
    outcomes = []
    for piece in (1 << 30, 100, 1000):
        monkeypatch.setattr("topkbench.operators._threshold.PIECE", piece)
        scores = draw(*shape).requires_grad_()
        mask = op(scores, k, 0.7)
        mask.backward(draw(*shape, seed=1))
        outcomes.append((mask.detach(), scores.grad))
    for pieces in outcomes[1:]:
        for ours, whole in zip(pieces, outcomes[0], strict=True):
            close(ours, whole, tol=1e-9)


@over(THRESHOLD)
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_ties_at_the_bottom(op, looks, dtype, monkeypatch):
    """As after a rectifier: steps land where every entry is 0 or 1, and must come back."""
    if not looks:
        monkeypatch.setattr("topkbench.operators._threshold.readable", lambda _: False)
    for n in (17, 64, 1000):
        scores = draw(8, n).relu().to(dtype)
        for k in sorted({1, n // 10, n // 2, 13 * n // 17, 9 * n // 10, n - 1, n}):
            for temperature in (0.01, 0.1, 1.0, 10.0):
                total = op(scores, k, temperature).sum(-1)
                close(total, torch.full_like(total, k), tol=1e-4 if dtype == torch.float32 else 1e-7)


@over(OPERATORS)
def test_vmap_over_the_temperature_alone(op):
    scores, hot = draw(5), torch.tensor([0.3, 1.0], dtype=torch.float64)
    batched = torch.vmap(lambda t: op(scores, 2, t))(hot)
    close(batched, torch.stack([op(scores, 2, t.item()) for t in hot]), tol=1e-12)


@over(OPERATORS)
def test_scores_may_lie_in_memory_as_they_like(op, monkeypatch):
    monkeypatch.setattr("topkbench.operators._threshold.PIECE", 10)
    g = draw(4, 3, 6, seed=1)
    outcomes = []
    for scores in (draw(6, 4, 3).movedim(0, -1), draw(3, 4, 6).transpose(0, 1)):
        for own in (scores.contiguous(), scores):
            leaf = own.expand(4, 3, 6).requires_grad_()
            mask = op(leaf, 2, 0.7)
            outcomes.append((mask, torch.autograd.grad(mask, leaf, g.expand_as(mask))[0]))
            mask = op(leaf, 2, 0.7)
            torch.autograd.grad(mask.sum(), leaf)  # an expanded cotangent
    for plain, strided in (outcomes[:2], outcomes[2:]):
        for ours, expected in zip(strided, plain, strict=True):
            close(ours, expected, tol=1e-12)


@over(SMOOTH)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_smooth_operators_have_derivatives_at_ties(op, k):
    for scores in ([1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]):
        leaf = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda s: op.selection(s, k, 0.5), leaf, eps=1e-6, rtol=1e-5, atol=1e-6
        )
        assert torch.autograd.gradgradcheck(lambda s: op(s, k, 0.5), leaf, eps=1e-6, rtol=1e-5, atol=1e-6)


def test_sparsemax_at_a_kink_has_the_derivative_of_the_flat_side():
    jacobian = torch.autograd.functional.jacobian(lambda s: sparsemax(s, 1), torch.tensor([1.0, 0.0, -3.0]))
    assert torch.equal(jacobian, torch.zeros(3, 3))


@over({name: op for name, op in OPERATORS.items() if op.guarantees.shift_invariant})
def test_large_scores_keep_their_digits(op):
    # In float32, 8192 + j / 1024 is exact, and so are its differences.
    scores = (draw(200, 6) * 100).round().float() / 1024
    for k in (1, 2, 5):
        close(op(scores + 8192, k, 0.05), op(scores, k, 0.05), tol=1e-5)


@over(OPERATORS)
def test_the_temperature_does_not_decide_the_precision(op):
    scores, temperature = draw(3, 5).float(), torch.full((3, 1), 0.5, dtype=torch.float64)
    for part in (op, op.selection, op.values):
        assert part(scores, 2, temperature).dtype == torch.float32
        close(part(scores, 2, temperature), part(scores, 2, 0.5), tol=1e-6)


def test_equal_scores_stay_equal_at_a_low_temperature():
    mask = topkbench.operators.softmax(torch.zeros(8, dtype=torch.float64), 7, 1e-3)
    close(mask, torch.full((8,), 7 / 8), tol=1e-12)


def test_the_root_is_found_where_the_bracket_has_no_width():
    close(sparsemax(torch.tensor([10000.2, 10000.1, 9990.0]), 1, 0.01).sum(), torch.tensor(1.0), tol=1e-6)


# The hard operators


@pytest.mark.parametrize("hard", HARD, ids=lambda hard: hard.__name__)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (3, 1)])
def test_hard_reference(hard, shape):
    scores = draw(*shape)
    for k in range(1, shape[-1] + 1):
        reference = getattr(references, hard.__name__)
        expected = [reference(row, k) for row in scores.reshape(-1, shape[-1]).numpy()]
        output = hard(scores, k)
        assert output.dtype == scores.dtype
        assert output.shape[: len(shape) - 1] == shape[:-1]
        close(output, np.array(expected).reshape(output.shape), tol=0)


@pytest.mark.parametrize("k", [1, 3, 4, 6])
def test_hard_ties(k):
    for scores in (torch.zeros(6), torch.tensor([1.0, 0, 1, 0, 1, -1])):
        mask, rows, values = (hard(scores, k) for hard in HARD)
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert mask.sum() == k
        assert torch.equal(rows.sum(-1), torch.ones(k))
        assert torch.equal(rows.sum(-2), mask)
        assert torch.equal(rows @ scores, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("rows", "n"), [(3, 40), (700, 31), (700, 40)])
def test_the_hard_mask_of_data_is_the_hard_mask(rows, n, dtype):
    """Also in rows with ties for rank k, infinite scores or NaN, among others that have none."""
    scores = draw(2, rows, n).to(dtype)
    scores[0, 1] = 0
    scores[0, 2, :30] = 1.0
    scores[1, 0, 5], scores[1, 0, 6], scores[1, 2, 7] = torch.inf, -torch.inf, torch.nan
    for k in (1, 5, n - 1, n):
        mask = hard_mask_of_data(scores, k)
        assert mask.dtype == dtype
        assert torch.equal(mask, hard_mask(scores, k))
    assert not hard_mask_of_data(scores.requires_grad_(), 5).requires_grad


def test_hard_masks_are_constants_for_autograd():
    scores = draw(3, 5).requires_grad_()
    assert not hard_mask(scores, 2).requires_grad
    assert not hard_selection(scores, 2).requires_grad


@pytest.mark.parametrize("k", [1, 2, 5])
def test_hard_values_send_the_gradient_to_the_index_of_the_rank(k):
    scores = draw(5)
    jacobian = torch.autograd.functional.jacobian(lambda s: hard_values(s, k), scores)
    assert torch.equal(jacobian, hard_selection(scores, k))


# Refusals


@pytest.fixture
def no_signature_checks(monkeypatch):
    """As for a user, who does not run under jaxtyping's import hook."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


BAD = [
    (torch.zeros(4, dtype=torch.int64), 2, TypeError, r"^scores must be floating point, got torch.int64$"),
    (
        torch.tensor(0.0),
        1,
        ValueError,
        r"^scores must have at least one dimension \(\.\.\., n\), got a scalar$",
    ),
    (torch.zeros(6), 0, ValueError, r"^k must be in \[1, 6\] for 6 scores, got 0$"),
    (torch.zeros(2, 6), 7, ValueError, r"^k must be in \[1, 6\] for 6 scores, got 7$"),
    (torch.zeros(6), 1.5, TypeError, r"^k must be an int, got 1\.5$"),
    (torch.zeros(6), True, TypeError, r"^k must be an int, got True$"),
]


@pytest.mark.usefixtures("no_signature_checks")
@pytest.mark.parametrize(("scores", "k", "error", "message"), BAD)
def test_bad_scores_or_k(scores, k, error, message):
    for op in OPERATORS.values():
        for part in (op, op.selection, op.values):
            with pytest.raises(error, match=message):
                part(scores, k, 1.0)
    for hard in HARD:
        with pytest.raises(error, match=message):
            hard(scores, k)


@pytest.mark.usefixtures("no_signature_checks")
@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0.0, r"^temperature must be > 0, got 0\.0$"),
        (-1, r"^temperature must be > 0, got -1$"),
        (float("nan"), r"^temperature must be > 0, got nan$"),
        (torch.ones(4), r"\(\.\.\., 1\) against scores of shape \(2, 4\), got shape \(4,\)$"),
        (torch.ones(1, 2, 1), r"against scores of shape \(2, 4\), got shape \(1, 2, 1\)$"),
        (torch.ones(3, 1), r"against scores of shape \(2, 4\), got shape \(3, 1\)$"),
    ],
)
@over(OPERATORS)
def test_bad_temperature(op, temperature, message):
    for part in (op, op.selection, op.values):
        with pytest.raises(ValueError, match=message):
            part(torch.zeros(2, 4), 2, temperature)


# The checks are able to fail


class Scaled(torch.autograd.Function):
    """The identity, but its vector-Jacobian product is multiplied by a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, _factor):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Cubic(torch.autograd.Function):
    """x + x^3 with the right gradient, which does not know that it depends on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x + x**3

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 + 3 * x.detach() ** 2)


class Flipped(torch.autograd.Function):
    """The identity, but under vmap it mixes up the batch."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(*_):
        pass

    @staticmethod
    def backward(_ctx, grad):
        return grad

    @staticmethod
    def vmap(_info, in_dims, x):
        return x.flip(in_dims[0]), in_dims[0]


class Unchecked(Operator):
    def __call__(self, scores, k, temperature=1.0):
        return self.function(scores, k, temperature)


class OtherRows(Operator):
    def selection(self, scores, k, temperature=1.0):
        return super().selection(scores, k, temperature) * 1.001


class OtherValues(Operator):
    def values(self, scores, k, temperature=1.0):
        return super().values(scores, k, temperature) + 0.001


class Widened(Operator):
    def values(self, scores, k, temperature=1.0):
        return super().values(scores, k, temperature).double()


class Narrowed(Operator):
    def values(self, scores, k, temperature=1.0):
        return super().values(scores, k, temperature).float()


def mask_of(s, k, t):
    return entropic.function(s, k, t)


def as_tensor(t):
    return torch.as_tensor(t, dtype=torch.float64)


def rounded(s):
    return s.bfloat16().float() if s.dtype == torch.float32 else s


def averaged(t):
    return t.mean() if isinstance(t, torch.Tensor) else t


BROKEN = [
    (testing.check_sums_to_k, lambda s, k, t: 1.001 * mask_of(s, k, t), "mask does not sum to k"),
    (testing.check_bounded, lambda s, k, t: 1.001 * mask_of(s, k, t), r"leaves \[0, 1\]"),
    (testing.check_monotone, lambda s, k, t: mask_of(-s, k, t), "falls"),
    (testing.check_shift_invariant, lambda s, k, t: mask_of(s**3, k, t), "shifted by 8"),
    (testing.check_hard_limit, lambda s, k, _: mask_of(s, k, 1.0), "is not hard"),
    (testing.check_hard_limit, lambda s, k, t: mask_of(-s, k, t), "is not hard"),
    (testing.check_sparse, mask_of, "away from the threshold"),
    (
        testing.check_permutation,
        lambda s, k, t: mask_of(s + torch.arange(s.shape[-1]) / 100, k, t),
        "mask is not equ",
    ),
    (
        testing.check_permutation,
        lambda s, k, t: mask_of(Scaled.apply(s, torch.arange(s.shape[-1])), k, t),
        "gradient of the mask is not equivariant",
    ),
    (
        testing.check_leading_dimensions,
        lambda s, k, t: mask_of(s * (1 + s.sum() ** 2), k, t),
        "mask differs from row",
    ),
    (
        testing.check_temperature_tensor,
        lambda s, k, t: mask_of(s, k, averaged(t)),
        "mask differs from row by row",
    ),
    (testing.check_vmap, lambda s, k, t: mask_of(Flipped.apply(s), k, t), "mask under vmap differs"),
    (testing.check_precision, lambda s, k, t: mask_of(rounded(s), k, t), "mask in float32 is off"),
    (
        testing.check_gradient,
        lambda s, k, t: mask_of(Scaled.apply(s, 1.1), k, t),
        "first derivative of the mask",
    ),
    (
        testing.check_gradient,
        lambda s, k, t: mask_of(Scaled.apply(s, -1.0), k, t),
        "first derivative of the mask",
    ),
    (
        testing.check_gradient,
        lambda s, k, t: mask_of(s, k, Scaled.apply(as_tensor(t), 1.1)),
        "first derivative of the mask",
    ),
    (
        testing.check_twice,
        lambda s, k, t: mask_of(Cubic.apply(s), k, t),
        "second derivative of the mask",
    ),
]


def exponentials(s, k, t):
    rows = (s / t).exp() / (s / t).exp().sum(-1, keepdim=True)
    return rows.unsqueeze(-2).expand(*s.shape[:-1], k, s.shape[-1])


def published(s, k, t):
    """Successive softmax by the formula as printed: log(1 - a) is -inf where a rounds to 1."""
    v, rows = s / t, []
    for _ in range(k):
        rows.append(v.softmax(-1))
        v = v + torch.log(1 - rows[-1]) / t
    return torch.stack(rows, -2)


@pytest.mark.parametrize(("check", "function", "message"), BROKEN)
def test_check_fails_on_a_broken_mask(check, function, message):
    with pytest.raises(AssertionError, match=message) as failure:
        check(operator(sparse=True)(function))
    assert all(word in str(failure.value) for word in ("scores=", "k=", "temperature="))


@pytest.mark.parametrize(
    ("check", "function", "message"),
    [
        (testing.check_ties, lambda s, k, _: hard_selection(s, k), "tells equal scores apart"),
        (testing.check_extremes, exponentials, "mask is not finite"),
        (testing.check_extremes, published, "is not finite"),
    ],
)
def test_check_fails_on_broken_rows(check, function, message):
    with pytest.raises(AssertionError, match=message):
        check(operator(has_rows=True)(function))


@pytest.mark.parametrize(
    ("check", "kind", "message"),
    [
        (testing.check_selection, OtherRows, "rows do not add up to the mask"),
        (testing.check_selection, OtherValues, "values are not <P_j, scores>"),
        (testing.check_precision, Widened, "(?s)values in float32 is off.*dtype"),
        (testing.check_precision, Narrowed, "values of float64 is not float64"),
        (testing.check_bad_input, Unchecked, "mask (says|is given instead)"),
    ],
)
def test_check_fails_on_a_broken_operator(check, kind, message):
    with pytest.raises(AssertionError, match=message):
        check(kind(mask_of, Guarantees()))
