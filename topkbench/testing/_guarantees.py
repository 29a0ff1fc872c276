"""One check for each guarantee an operator may declare."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from topkbench.operators import Operator, hard_mask, hard_selection
from topkbench.testing._cases import (
    SEPARATED,
    Case,
    Part,
    cases,
    close,
    counts,
    draw,
    outcomes_of,
    parts,
    require,
)


def check_sums_to_k(operator: Operator) -> None:
    """The mask sums to k."""
    for case in cases():
        total = operator(*case).sum(-1)
        close(total, torch.full_like(total, case.k), "mask does not sum to k", case)


def check_bounded(operator: Operator) -> None:
    """The mask lies in [0, 1], but for the rounding of a sum over rows."""
    for case in (*cases(), *(Case(SEPARATED, k, 1e-3) for k in counts(6))):
        mask = operator(*case)
        require((mask >= -1e-12) & (mask <= 1 + 1e-12), f"mask {mask.tolist()} leaves [0, 1]", case)


def check_monotone(operator: Operator) -> None:
    """A larger score never gets a smaller mask, but for rounding."""
    for case in (*cases(operator.guarantees.ties), *(Case(draw(20, 6), k, 1e-3) for k in counts(6))):
        mask = operator(*case).gather(-1, case.scores.argsort(-1))
        require(mask.diff(dim=-1) >= -1e-12, f"mask {mask.tolist()} of the ascending scores falls", case)


def check_shift_invariant(operator: Operator) -> None:
    """Adding a constant to all scores of a row does not change the selection, and so not the mask."""
    for case in cases():
        moved = operator.selection(case.scores + 8, case.k, case.temperature)
        # The shifted scores round by 1e-15, which a low temperature amplifies at each of k steps.
        close(moved, operator.selection(*case), "shifted by 8, selection changes", case, tol=1e-8)


def check_hard_limit(operator: Operator) -> None:
    """At a temperature far below the gaps, mask and selection are nearly the hard ones."""
    for case in (Case(SEPARATED, k, 1e-4) for k in counts(6)):
        rows, hard = operator.selection(*case), hard_selection(SEPARATED, case.k)
        # 1e-3 also admits kernels with heavy tails, whose error is of the order of temperature / gap.
        close(rows, hard, "selection is not hard", case, tol=1e-3)
        close(operator(*case), hard.sum(-2), "mask is not hard", case, tol=1e-3)


def check_sparse(operator: Operator) -> None:
    """Scores that are many temperatures below the k largest get a mask of exactly zero."""
    for case in (Case(SEPARATED, k, 0.02) for k in counts(6)):
        below = operator(*case)[hard_mask(SEPARATED, case.k) == 0]
        require(below == 0, f"mask has {below.tolist()} away from the threshold", case)


def check_uniform_limit(operator: Operator) -> None:
    """At a temperature far above the scores every entry of the mask is nearly k/n."""
    for case in (Case(SEPARATED, k, 1e8) for k in counts(6)):
        mask = operator(*case)
        close(mask, torch.full_like(mask, case.k / 6), "mask is not k/n", case, tol=1e-6)


def check_rows_sum_to_1(operator: Operator) -> None:
    """Each row of the selection is non-negative and sums to 1, but for rounding."""
    for case in cases():
        rows = operator.selection(*case)
        require(rows >= -1e-9, "a row of the selection is negative", case)
        total = rows.sum(-1)
        close(total, torch.ones_like(total), "a row of the selection does not sum to 1", case)


def check_infinite(operator: Operator) -> None:
    """One score of -inf is never taken and one of +inf always, with finite gradients; the rest as without."""
    for k, infinity, temperature in product((1, 2, 4), (-torch.inf, torch.inf), (0.5, 2.0)):
        row = SEPARATED.clone()
        row[3] = infinity
        case = Case(row.requires_grad_(), k, temperature)
        mask = operator(*case)
        taken = torch.tensor(float(infinity > 0), dtype=mask.dtype)
        close(mask[3], taken, f"a score of {infinity} is not all or nothing", case)
        require(mask.isfinite(), "mask is not finite", case)
        (gradient,) = torch.autograd.grad(mask.square().sum(), row)
        require(gradient.isfinite(), "gradient is not finite", case)
        hot = torch.tensor(temperature, dtype=mask.dtype, requires_grad=True)
        total = operator(row.detach(), k, hot).square().sum()
        if total.requires_grad:
            (slope,) = torch.autograd.grad(total, hot)
            require(slope.isfinite(), "gradient in the temperature is not finite", case)
        if k > (infinity > 0):
            others = torch.cat([SEPARATED[:3], SEPARATED[4:]])
            alone = operator(others, k - int(infinity > 0), temperature)
            close(torch.cat([mask[:3], mask[4:]]), alone, "the others are not as without it", case)


def check_permutation(operator: Operator) -> None:
    """Permuting the scores permutes the mask, the rows of the selection and the gradients, not the values."""
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for k in counts(6):
        case = Case(draw(3, 6), k, 0.5)
        plain = outcomes_of(operator, case)
        for name, actual in outcomes_of(operator, case._replace(scores=case.scores[:, order])).items():
            expected = plain[name] if name == "values" else plain[name][..., order]
            close(actual, expected, f"{name} is not equivariant, permuted by {order.tolist()},", case)


def check_ties(operator: Operator) -> None:
    """Equal scores get equal entries in every row of the selection: what equivariance implies."""
    scores = torch.tensor([[1, 0, 1, 0, 0, -1], [2, 2, 2, 2, 2, 2]], dtype=torch.float64)
    swapped = [2, 3, 0, 4, 1, 5]  # only equal scores change places
    for k, temperature in product(counts(6), (0.3, 1.0)):
        case = Case(scores, k, temperature)
        rows = operator.selection(*case)
        close(rows[..., swapped], rows, "selection tells equal scores apart", case)


def check_masked(operator: Operator) -> None:
    """As many scores of -inf as leave k others: these are taken, at any temperature, in any precision."""
    scores = torch.tensor([1.0, 2.0, -torch.inf, -torch.inf, -torch.inf], dtype=torch.float64)
    for dtype, temperature in product((torch.float64, torch.float32), (1e-3, 0.05, 1.0)):
        case = Case(scores.to(dtype).requires_grad_(), 2, temperature)
        mask = operator(*case)
        close(mask[2:], torch.zeros_like(mask[2:]), "a score of -inf is taken", case, tol=1e-5)
        require(mask.isfinite(), "mask is not finite", case)
        (gradient,) = torch.autograd.grad(mask.square().sum(), case.scores)
        require(gradient.isfinite(), "gradient is not finite", case)


def check_infinite_scores(operator: Operator) -> None:
    """What `infinite` promises: `check_infinite` and `check_masked`."""
    check_infinite(operator)
    check_masked(operator)


def check_gradient(operator: Operator) -> None:
    """The gradient in the scores, and in the temperature if there is one, is the derivative."""
    for case in _points():
        for name, part in parts(operator).items():
            _check_derivative(gradcheck, "first", part, name, case)


def check_twice(operator: Operator) -> None:
    """The gradient has the right derivative in its turn."""
    for case in _points():
        for name, part in parts(operator).items():
            _check_derivative(gradgradcheck, "second", part, name, case)


def _points() -> list[Case]:
    one, each = (torch.tensor(t, dtype=torch.float64) for t in (0.3, [[0.5], [1.0]]))
    # A normal draw lies within a step, 1e-6, of a kink with a probability of about 1e-5.
    rows = ((draw(4), one), (draw(2, 4), each))
    return [Case(scores, k, temperature) for k, (scores, temperature) in product(counts(4), rows)]


def _check_derivative(measured: Callable[..., bool], order: str, part: Part, name: str, case: Case) -> None:
    scores, hot = (torch.as_tensor(x).clone().requires_grad_() for x in (case.scores, case.temperature))
    total = part(scores, case.k, hot).sum()
    if not total.requires_grad:  # a constant
        return
    follows = torch.autograd.grad(total, hot, allow_unused=True)[0] is not None

    def function(scores: Tensor, temperature: float | Tensor = case.temperature) -> Tensor:
        return part(scores, case.k, temperature)

    leaves = (scores, hot) if follows else (scores,)
    with torch.random.fork_rng(devices=[]):  # gradgradcheck draws a cotangent
        torch.manual_seed(0)
        try:
            # A difference quotient with this step has a rounding error of about 1e-9 times its terms.
            measured(function, leaves, eps=1e-6, rtol=1e-5, atol=1e-6)
        except GradcheckError as error:
            raise AssertionError(f"wrong {order} derivative of the {name} at {case}\n{error}") from error


GUARANTEED = {
    "sums_to_k": check_sums_to_k,
    "bounded": check_bounded,
    "monotone": check_monotone,
    "shift_invariant": check_shift_invariant,
    "hard_limit": check_hard_limit,
    "sparse": check_sparse,
    "uniform_limit": check_uniform_limit,
    "rows_sum_to_1": check_rows_sum_to_1,
    "infinite": check_infinite_scores,
    "equivariant": check_permutation,
    "ties": check_ties,
    "gradient": check_gradient,
    "twice": check_twice,
}
