"""The checks that every operator must pass."""

import re
from itertools import product

import torch
from torch import Tensor

from topkbench.operators import Operator
from topkbench.testing._cases import Case, cases, close, counts, draw, outcomes_of, parts, require


def check_selection(operator: Operator) -> None:
    """The rows of the selection add up to the mask, and the values are their products with the scores."""
    for case in cases(operator.guarantees.ties):
        rows = operator.selection(*case)
        products = (rows * case.scores.unsqueeze(-2)).sum(-1)
        close(rows.sum(-2), operator(*case), "rows do not add up to the mask", case)
        close(operator.values(*case), products, "values are not <P_j, scores>", case)


def check_leading_dimensions(operator: Operator) -> None:
    """Any leading dimensions, an empty one included, give what each row gives alone."""
    for k, shape in product(counts(4), ((), (3,), (2, 3), (0,), (2, 0))):
        _check_row_by_row(operator, Case(draw(*shape, 4), k, 0.5))


def check_temperature_tensor(operator: Operator) -> None:
    """A temperature tensor acts as the number it holds, and one of shape (..., 1) row by row."""
    for k, shape in product(counts(4), ((), (1,), (3, 1), (2, 1, 1), (2, 3, 1))):
        _check_row_by_row(operator, Case(draw(2, 3, 4), k, 0.3 + draw(*shape, seed=1).abs()))


def _check_row_by_row(operator: Operator, case: Case) -> None:
    *leading, n = case.scores.shape
    sizes = {"mask": (n,), "selection": (case.k, n), "values": (case.k,)}
    each = torch.as_tensor(case.temperature, dtype=torch.float64).expand(*leading, 1).flatten().tolist()
    rows = zip(case.scores.reshape(-1, n), each, strict=True)
    alone = [outcomes_of(operator, Case(row, case.k, temperature)) for row, temperature in rows]
    for name, output in outcomes_of(operator, case).items():
        expected = (*leading, *sizes.get(name, (n,)))
        require(output.shape == expected, f"{name} has shape {tuple(output.shape)}, not {expected},", case)
        if alone:
            rowwise = torch.stack([outcomes[name] for outcomes in alone]).reshape(output.shape)
            close(output, rowwise, f"{name} differs from row by row", case)


def check_vmap(operator: Operator) -> None:
    """`torch.vmap` over scores, temperatures or both equals the loop, also for gradients."""
    scores, hot = draw(3, 4), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    for k, (s, t) in product(counts(4), ((scores, hot[0]), (scores[0], hot), (scores, hot))):

        def outcomes(s: Tensor, t: Tensor, k: int = k) -> dict[str, Tensor]:
            return outcomes_of(operator, Case(s, k, t))

        looped = [outcomes(*pair) for pair in zip(s.expand(3, 4), t.expand(3), strict=True)]
        batched = torch.vmap(outcomes, (0 if s.dim() == 2 else None, 0 if t.dim() == 1 else None))(s, t)
        for name, output in batched.items():
            what = f"{name} under vmap differs from the loop"
            close(output, torch.stack([one[name] for one in looped]), what, Case(s, k, t))


def check_precision(operator: Operator) -> None:
    """The dtype of the scores is kept, and float32 gives nearly what float64 gives."""
    for k in counts(6):
        double = Case(draw(3, 6), k, 1.0)
        single = Case(double.scores.float(), k, 1.0)
        expected = outcomes_of(operator, double)
        for name, actual in outcomes_of(operator, single).items():
            require(expected[name].dtype == torch.float64, f"{name} of float64 is not float64", double)
            # A few tens of float32 roundings of numbers of order 1; the dtype is compared too.
            close(actual, expected[name].float(), f"{name} in float32 is off", single, tol=1e-5)


def check_extremes(operator: Operator) -> None:
    """Huge, tiny, equal and far apart scores, and a low temperature, give finite outputs and gradients."""
    row, equal = draw(1, 6), torch.zeros(1, 6, dtype=torch.float64)
    far = torch.tensor([[1e4, 1e4, 0, 1e-8, -1e4, -1e4]], dtype=torch.float64)
    rows = torch.cat([1e4 * row, 1e-8 * row, equal, equal + 1e4, equal - 1e4, far])
    for dtype, k, temperature in product((torch.float64, torch.float32), counts(6), (1.0, 1e-3)):
        scores, hot = (x.to(dtype, copy=True).requires_grad_() for x in (rows, torch.tensor(temperature)))
        case = Case(scores, k, hot)
        for name, part in parts(operator).items():
            output = part(*case)
            require(output.isfinite(), f"{name} is not finite", case)
            for slope in torch.autograd.grad(output.square().sum(), (scores, hot), materialize_grads=True):
                require(slope.isfinite(), f"gradient of the {name} is not finite", case)


def check_bad_input(operator: Operator) -> None:
    """A k or temperature out of range, or of the wrong kind or shape, is refused by name."""
    good, ones = draw(2, 4), torch.ones(2, dtype=torch.float64)
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
        case = Case(scores, k, temperature)  # type: ignore[arg-type]
        for name, part in parts(operator).items():
            try:
                part(*case)
            except Exception as refusal:
                named = isinstance(refusal, error) and re.search(message, str(refusal)) is not None
                require(named, f"{name} says {refusal!r} instead of {error.__name__} with {message!r}", case)
            else:
                raise AssertionError(f"{name} is given instead of {error.__name__} at {case}")


def check_counts(operator: Operator) -> None:
    """A tensor k gives each row its own, in mask and gradient."""
    scores, counts = draw(2, 3, 4), torch.tensor([[1, 4, 2], [3, 1, 1]])
    for k in (counts, counts[0], counts[:, :1]):
        leaf = scores.clone().requires_grad_()
        mask = operator(leaf, k, 0.5)
        (gradient,) = torch.autograd.grad(mask.square().sum(), leaf)
        for i, j in product(range(2), range(3)):
            count = int(k.expand(2, 3)[i, j])
            row = scores[i, j].clone().requires_grad_()
            case = Case(row, count, 0.5)
            alone = operator(*case)
            (expected,) = torch.autograd.grad(alone.square().sum(), row)
            close(mask[i, j], alone, "mask with a tensor k differs", case)
            close(gradient[i, j], expected, "gradient with a tensor k differs", case)


def check_nan(operator: Operator) -> None:
    """A row with NaN gives NaN somewhere, without an error, and leaves the other rows alone."""
    scores = draw(3, 4)
    scores[1, 2] = torch.nan
    for k in (1, 2):
        case = Case(scores, k, 0.5)
        mask = operator(*case)
        require(mask[1].isnan().any(), "NaN disappears", case)
        close(mask[::2], operator(scores[::2], k, 0.5), "a row with NaN changes other rows", case)


ALWAYS = (
    *(check_selection, check_leading_dimensions, check_temperature_tensor),
    *(check_vmap, check_precision, check_extremes, check_bad_input, check_counts, check_nan),
)
