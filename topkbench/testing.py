"""The operator contract as functions that an outside operator can run too: `check_operator(my_operator)`.

A check takes an `Operator` and raises AssertionError with what was violated and at which scores, k and
temperature. A guarantee is checked where it is declared, the rest for every operator. The points are drawn
from fixed seeds, in float64 unless the check is about another precision.
"""

import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from topkbench.operators import Operator, hard_mask, hard_selection

Part = Callable[..., Tensor]
SEPARATED = torch.tensor([0.2, -1.0, 1.0, -0.6, 0.6, -0.2], dtype=torch.float64)


class _Case(NamedTuple):
    scores: Tensor
    k: int
    temperature: float | Tensor

    def __str__(self) -> str:
        return f"scores={self.scores.tolist()}, k={self.k}, temperature={self.temperature}"


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _counts(n: int) -> list[int]:
    return sorted({k for k in (1, 2, n - 1, n) if 1 <= k <= n})


def _cases() -> Iterator[_Case]:
    """Ordinary, widely spread, equal and half equal rows; n = 1 included."""
    for n in (1, 2, 6):
        pairs = (torch.arange(n, dtype=torch.float64) % 2).expand(1, n)
        scores = torch.cat([_draw(3, n), 100 * _draw(1, n, seed=1), torch.zeros_like(pairs), pairs])
        for k, temperature in product(_counts(n), (0.1, 1.0, 10.0)):
            yield _Case(scores, k, temperature)


def _parts(operator: Operator) -> dict[str, Part]:
    return {"mask": operator, "selection": operator.selection, "values": operator.values}


def _outcomes(operator: Operator, case: _Case) -> dict[str, Tensor]:
    """Mask, selection and values, and the gradient of the sum of squares of each."""
    outcomes = {}
    for name, part in _parts(operator).items():

        def square(scores: Tensor, part: Part = part) -> tuple[Tensor, Tensor]:
            output = part(scores, case.k, case.temperature)
            return output.square().sum(), output

        # torch.func and not backward(), so that this also runs under vmap.
        gradient, outcomes[name] = torch.func.grad(square, has_aux=True)(case.scores)
        outcomes[f"gradient of the {name}"] = gradient
    return outcomes


def _close(actual: Tensor, expected: Tensor, what: str, case: _Case, *, tol: float = 1e-9) -> None:
    """The default is far above rounding in float64 and leaves room for a solver that stops at a tolerance."""
    text = f"{what} at {case}\n"
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, msg=lambda detail: text + detail)


def _require(condition: Tensor | bool, what: str, case: _Case) -> None:
    if not torch.as_tensor(condition).all():
        raise AssertionError(f"{what} at {case}")


def check_sums_to_k(operator: Operator) -> None:
    """The mask sums to k."""
    for case in _cases():
        total = operator(*case).sum(-1)
        _close(total, torch.full_like(total, case.k), "mask does not sum to k", case)


def check_bounded(operator: Operator) -> None:
    """The mask lies in [0, 1], but for the rounding of a sum over rows."""
    for case in _cases():
        mask = operator(*case)
        _require((mask >= -1e-12) & (mask <= 1 + 1e-12), f"mask {mask.tolist()} leaves [0, 1]", case)


def check_monotone(operator: Operator) -> None:
    """A larger score never gets a smaller mask, but for rounding."""
    for case in _cases():
        mask = operator(*case).gather(-1, case.scores.argsort(-1))
        _require(mask.diff(dim=-1) >= -1e-12, f"mask {mask.tolist()} of the ascending scores falls", case)


def check_shift_invariant(operator: Operator) -> None:
    """Adding a constant to all scores of a row does not change the selection, and so not the mask."""
    for case in _cases():
        moved = operator.selection(case.scores + 8, case.k, case.temperature)
        # The shifted scores round by 1e-15, which a low temperature amplifies at each of k steps.
        _close(moved, operator.selection(*case), "shifted by 8, selection changes", case, tol=1e-8)


def check_hard_limit(operator: Operator) -> None:
    """At a temperature far below the gaps, mask and selection are nearly the hard ones."""
    for case in (_Case(SEPARATED, k, 1e-4) for k in _counts(6)):
        rows, hard = operator.selection(*case), hard_selection(SEPARATED, case.k)
        # 1e-3 also admits kernels with heavy tails, whose error is of the order of temperature / gap.
        _close(rows, hard, "selection is not hard", case, tol=1e-3)
        _close(operator(*case), hard.sum(-2), "mask is not hard", case, tol=1e-3)


def check_sparse(operator: Operator) -> None:
    """Scores that are many temperatures below the k largest get a mask of exactly zero."""
    for case in (_Case(SEPARATED, k, 1e-3) for k in _counts(6)):
        below = operator(*case)[hard_mask(SEPARATED, case.k) == 0]
        _require(below == 0, f"mask has {below.tolist()} away from the threshold", case)


def check_selection(operator: Operator) -> None:
    """The rows of the selection add up to the mask, and the values are their products with the scores."""
    for case in _cases():
        rows = operator.selection(*case)
        products = (rows * case.scores.unsqueeze(-2)).sum(-1)
        _close(rows.sum(-2), operator(*case), "rows do not add up to the mask", case)
        _close(operator.values(*case), products, "values are not <P_j, scores>", case)


def check_ties(operator: Operator) -> None:
    """Equal scores get equal entries in every row of the selection: what equivariance implies."""
    scores = torch.tensor([[1, 0, 1, 0, 0, -1], [2, 2, 2, 2, 2, 2]], dtype=torch.float64)
    swapped = [2, 3, 0, 4, 1, 5]  # only equal scores change places
    for k, temperature in product(_counts(6), (0.3, 1.0)):
        case = _Case(scores, k, temperature)
        rows = operator.selection(*case)
        _close(rows[..., swapped], rows, "selection tells equal scores apart", case)


def check_permutation(operator: Operator) -> None:
    """Permuting the scores permutes the mask, the rows of the selection and the gradients, not the values."""
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for k in _counts(6):
        case = _Case(_draw(3, 6), k, 0.5)
        plain = _outcomes(operator, case)
        for name, actual in _outcomes(operator, case._replace(scores=case.scores[:, order])).items():
            expected = plain[name] if name == "values" else plain[name][..., order]
            _close(actual, expected, f"{name} is not equivariant, permuted by {order.tolist()},", case)


def check_leading_dimensions(operator: Operator) -> None:
    """Any leading dimensions, an empty one included, give what each row gives alone."""
    for k, shape in product(_counts(4), ((), (3,), (2, 3), (0,), (2, 0))):
        _check_row_by_row(operator, _Case(_draw(*shape, 4), k, 0.5))


def check_temperature_tensor(operator: Operator) -> None:
    """A temperature tensor acts as the number it holds, and one of shape (..., 1) row by row."""
    for k, shape in product(_counts(4), ((), (1,), (3, 1), (2, 1, 1), (2, 3, 1))):
        _check_row_by_row(operator, _Case(_draw(2, 3, 4), k, 0.3 + _draw(*shape, seed=1).abs()))


def _check_row_by_row(operator: Operator, case: _Case) -> None:
    *leading, n = case.scores.shape
    sizes = {"mask": (n,), "selection": (case.k, n), "values": (case.k,)}
    each = torch.as_tensor(case.temperature, dtype=torch.float64).expand(*leading, 1).flatten().tolist()
    rows = zip(case.scores.reshape(-1, n), each, strict=True)
    alone = [_outcomes(operator, _Case(row, case.k, temperature)) for row, temperature in rows]
    for name, output in _outcomes(operator, case).items():
        expected = (*leading, *sizes.get(name, (n,)))
        _require(output.shape == expected, f"{name} has shape {tuple(output.shape)}, not {expected},", case)
        if alone:
            rowwise = torch.stack([outcomes[name] for outcomes in alone]).reshape(output.shape)
            _close(output, rowwise, f"{name} differs from row by row", case)


def check_vmap(operator: Operator) -> None:
    """`torch.vmap` over scores, temperatures or both equals the loop, also for gradients."""
    scores, hot = _draw(3, 4), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    for k, (s, t) in product(_counts(4), ((scores, hot[0]), (scores[0], hot), (scores, hot))):

        def outcomes(s: Tensor, t: Tensor, k: int = k) -> dict[str, Tensor]:
            return _outcomes(operator, _Case(s, k, t))

        looped = [outcomes(*pair) for pair in zip(s.expand(3, 4), t.expand(3), strict=True)]
        batched = torch.vmap(outcomes, (0 if s.dim() == 2 else None, 0 if t.dim() == 1 else None))(s, t)
        for name, output in batched.items():
            what = f"{name} under vmap differs from the loop"
            _close(output, torch.stack([one[name] for one in looped]), what, _Case(s, k, t))


def check_precision(operator: Operator) -> None:
    """The dtype of the scores is kept, and float32 gives nearly what float64 gives."""
    for k in _counts(6):
        double = _Case(_draw(3, 6), k, 1.0)
        single = _Case(double.scores.float(), k, 1.0)
        expected = _outcomes(operator, double)
        for name, actual in _outcomes(operator, single).items():
            _require(expected[name].dtype == torch.float64, f"{name} of float64 is not float64", double)
            # A few tens of float32 roundings of numbers of order 1; the dtype is compared too.
            _close(actual, expected[name].float(), f"{name} in float32 is off", single, tol=1e-5)


def check_extremes(operator: Operator) -> None:
    """Huge, tiny, equal and far apart scores, and a low temperature, give finite outputs and gradients."""
    row, equal = _draw(1, 6), torch.zeros(1, 6, dtype=torch.float64)
    far = torch.tensor([[1e4, 1e4, 0, 1e-8, -1e4, -1e4]], dtype=torch.float64)
    rows = torch.cat([1e4 * row, 1e-8 * row, equal, equal + 1e4, equal - 1e4, far])
    for dtype, k, temperature in product((torch.float64, torch.float32), _counts(6), (1.0, 1e-3)):
        scores, hot = (x.to(dtype, copy=True).requires_grad_() for x in (rows, torch.tensor(temperature)))
        case = _Case(scores, k, hot)
        for name, part in _parts(operator).items():
            output = part(*case)
            _require(output.isfinite(), f"{name} is not finite", case)
            for slope in torch.autograd.grad(output.square().sum(), (scores, hot), materialize_grads=True):
                _require(slope.isfinite(), f"gradient of the {name} is not finite", case)


def check_bad_input(operator: Operator) -> None:
    """A k or temperature out of range, or of the wrong kind or shape, is refused by name."""
    good, ones = _draw(2, 4), torch.ones(2, dtype=torch.float64)
    # Where signatures are checked as well (jaxtyping's import hook), a wrong type is refused by that text.
    for scores, k, temperature, error, message in (
        (good, 0, 1.0, ValueError, r"k must be in \[1, 4\] .*got 0"),
        (good, 5, 1.0, ValueError, r"k must be in \[1, 4\] .*got 5"),
        (good, 1.5, 1.0, TypeError, r"k must be an int, got 1\.5|typechecking parameter 'k'"),
        (good, 2, 0.0, ValueError, r"temperature must be > 0, got 0"),
        (good, 2, -1.0, ValueError, r"temperature must be > 0, got -1"),
        (good, 2, ones, ValueError, r"temperature must be .*got shape \(2,\)"),
        (good, 2, ones.reshape(2, 1, 1), ValueError, r"temperature must be .*got shape \(2, 1, 1\)"),
        (good.long(), 2, 1.0, TypeError, r"scores must be floating point|typechecking parameter 'scores'"),
    ):
        case = _Case(scores, k, temperature)  # type: ignore[arg-type]
        for name, part in _parts(operator).items():
            try:
                part(*case)
            except Exception as refusal:
                named = isinstance(refusal, error) and re.search(message, str(refusal)) is not None
                _require(named, f"{name} says {refusal!r} instead of {error.__name__} with {message!r}", case)
            else:
                raise AssertionError(f"{name} is given instead of {error.__name__} at {case}")


def check_gradients(operator: Operator) -> None:
    """First and second derivatives in the scores, and in the temperature if there is one, are as measured."""
    one, each = (torch.tensor(t, dtype=torch.float64) for t in (0.3, [[0.5], [1.0]]))
    # A normal draw lies within a step, 1e-6, of a kink with a probability of about 1e-5.
    for k, (scores, temperature) in product(_counts(4), ((_draw(4), one), (_draw(2, 4), each))):
        for name, part in _parts(operator).items():
            _check_derivatives(part, name, _Case(scores, k, temperature))


def _check_derivatives(part: Part, name: str, case: _Case) -> None:
    scores, hot = (torch.as_tensor(x).clone().requires_grad_() for x in (case.scores, case.temperature))
    total = part(scores, case.k, hot).sum()
    follows = torch.autograd.grad(total, hot, allow_unused=True)[0] is not None

    def function(scores: Tensor, temperature: float | Tensor = case.temperature) -> Tensor:
        return part(scores, case.k, temperature)

    leaves = (scores, hot) if follows else (scores,)
    for order, measured in (("first", gradcheck), ("second", gradgradcheck)):
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
}
ALWAYS = (
    *(check_selection, check_ties, check_permutation, check_leading_dimensions, check_temperature_tensor),
    *(check_vmap, check_precision, check_extremes, check_bad_input, check_gradients),
)


def checks(operator: Operator) -> list[Callable[[Operator], None]]:
    """The checks that apply to an operator: one for each guarantee that it declares, then those for all."""
    declared = [check for name, check in GUARANTEED.items() if getattr(operator.guarantees, name)]
    return [*declared, *ALWAYS]


def check_operator(operator: Operator) -> None:
    """Run all checks that apply to an operator; the first that fails raises its AssertionError."""
    for check in checks(operator):
        check(operator)
