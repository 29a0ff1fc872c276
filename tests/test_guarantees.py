"""What operators promise, on scores that hypothesis draws: of mixed scale, with ties, in double precision.

`topkbench.testing` checks each guarantee at fixed points; here are those that speak of any scores, k and
temperature. Scores are multiples of 1/64 up to 512, so that shifts by such numbers, and all differences, are
exact: what remains is the rounding of the operators themselves. Who does not promise anything for ties is
given none. Where a promise was found not to hold is written down below (EXEMPT), and it is
checked elsewhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import topkbench.operators
from topkbench.operators import Operator, dftopk, entropic, hard_mask, operator, softmax, softsort
from topkbench.testing._cases import Case, close, outcomes_of, require

OPERATORS = {name: thing for name, thing in vars(topkbench.operators).items() if isinstance(thing, Operator)}
SOLVED = 1e-9  # far above rounding, and room for a solver that stops at a tolerance


class Drawn(NamedTuple):
    """A row, and what is done to it."""

    case: Case
    order: list[int]
    shift: float
    place: int


@st.composite
def drawn(draw, ties=True):
    n = draw(st.integers(2, 12))
    entry = st.builds(lambda i, e: i * 2.0**e, st.integers(-8, 8), st.integers(-6, 6))
    if ties:  # from a pool that is often smaller than n
        pool = draw(st.lists(entry, min_size=1, max_size=n))
        scores = draw(st.lists(st.sampled_from(pool), min_size=n, max_size=n))
    else:
        scores = draw(st.lists(entry, min_size=n, max_size=n, unique=True))
    temperature = 0.05 * 400 ** draw(st.floats(0, 1))
    case = Case(torch.tensor(scores, dtype=torch.float64), draw(st.integers(1, n)), temperature)
    return Drawn(case, draw(st.permutations(range(n))), draw(entry), draw(st.integers(0, n - 1)))


def successive(case):
    """Successive softmax may amplify a rounding by 1 + 1 / temperature at each of its k - 1 steps."""
    return SOLVED + 1e-14 * (1 + 1 / case.temperature) ** (case.k - 1)


def sums_to_k(op, row):
    close(op(*row.case).sum(), torch.tensor(float(row.case.k)).double(), "sum", row.case, tol=SOLVED)


def bounded(op, row):
    mask = op(*row.case)
    require((mask >= -1e-12) & (mask <= 1 + 1e-12), f"mask {mask.tolist()} leaves [0, 1]", row.case)


def monotone(op, row):
    mask = op(*row.case)[row.case.scores.argsort()]
    require(mask.diff() >= -1e-12, f"mask {mask.tolist()} of the ascending scores falls", row.case)


def shift_invariant(op, row):
    scores, k, temperature = row.case
    moved = op.selection(scores + row.shift, k, temperature)
    close(moved, op.selection(*row.case), f"shifted by {row.shift}, rows change", row.case, tol=SOLVED)


def equivariant(op, row):
    order = row.order
    plain = outcomes_of(op, row.case)
    for name, actual in outcomes_of(op, row.case._replace(scores=row.case.scores[order])).items():
        expected = plain[name] if name == "values" else plain[name][..., order]
        # Gradients are of sums of squares of values, and in units of 1 / temperature.
        scale = 1 + expected.abs().max().item() + row.case.scores.abs().max().item() ** 2
        tol = successive(row.case) * (scale / row.case.temperature if "gradient" in name else 1)
        close(actual, expected, f"{name} permuted by {order}", row.case, tol=max(tol, SOLVED))


def ties(op, row):
    rows = op.selection(*row.case)
    for score in row.case.scores.unique():
        same = rows[:, row.case.scores == score]
        close(same, same[:, :1].expand_as(same), "rows tell equal scores apart", row.case, tol=SOLVED)


def rows_sum_to_1(op, row):
    rows = op.selection(*row.case)
    require(rows >= -SOLVED, "a row of the selection is negative", row.case)
    close(rows.sum(-1), torch.ones_like(rows[:, 0]), "a row sums to something else", row.case, tol=SOLVED)


def infinite(op, row):
    for infinity in (torch.inf, -torch.inf):
        if infinity < 0 and row.case.k == len(row.case.scores):
            continue
        scores, taken = row.case.scores.clone(), float(infinity > 0)
        scores[row.place] = infinity
        case = row.case._replace(scores=scores.requires_grad_())
        mask = op(*case)
        close(mask[row.place], torch.tensor(taken).double(), f"{infinity} is not all or nothing", case)
        (gradient,) = torch.autograd.grad(mask.square().sum(), scores)
        require(mask.isfinite() & gradient.isfinite(), "mask or gradient is not finite", case)
        rest = torch.arange(len(scores)) != row.place
        if case.k > taken:
            alone = op(row.case.scores[rest], case.k - int(taken), case.temperature)
            close(mask[rest], alone, "the others are not as without it", case, tol=successive(case))


def sparse(op, row):
    scores, k, temperature = row.case
    # A chain of pooled scores is at most n temperatures long.
    far = scores < scores.sort(descending=True).values[k - 1] - 2 * len(scores) * temperature
    below = op(*row.case)[far]
    require(below == 0, f"mask has {below.tolist()} far below the k largest", row.case)


def uniform_limit(op, row):
    scores, k, _ = row.case
    spread = (scores.max() - scores.min()).item() or 1.0
    case = Case(scores, k, 1e6 * spread)
    mask = op(*case)
    # The steepest, NeuralSort, differs by up to 2 n k spread / temperature.
    close(mask, torch.full_like(mask, k / len(scores)), "mask is not k/n", case, tol=3e-4)


def hard_limit(op, row):
    scores, k, _ = row.case
    ranked = scores.sort(descending=True).values
    gap = (ranked[k - 1] - ranked[k]).item() if k < len(scores) else 1.0
    if gap > 0:
        case = Case(scores, k, 1e-6 * gap)
        # The slowest, a Cauchy threshold, differs by up to n temperature / gap.
        close(op(*case), hard_mask(scores, k), "mask is not hard", case, tol=2e-5)


PROPERTIES = [
    sums_to_k,
    bounded,
    monotone,
    shift_invariant,
    equivariant,
    ties,
    rows_sum_to_1,
    infinite,
    sparse,
    uniform_limit,
    hard_limit,
]


class Exempt(NamedTuple):
    """A promise that does not always hold: where it does, where it does not, and why."""

    op: Operator
    holds: Callable[[Operator, Drawn], None]
    where: dict[str, object]
    scores: list[float]
    k: int
    temperature: float
    why: str


TIE = "scores that tie for the last place are told apart by the gradient: one of them is the k-th"
EXEMPT = [
    Exempt(dftopk, equivariant, {"ties": False}, [0, 0, 0], 1, 0.05, TIE),
    Exempt(softsort, equivariant, {"ties": False}, [0, 1, 1], 1, 20.0, TIE),
    Exempt(
        *(softmax, hard_limit, {"ties": False}, [0.25, 0.25, 0], 2, 1.0),
        why="of a tie each is pushed down by log 2 / temperature only, and not below what is log 2 lower",
    ),
]


def where(op, holds):
    options = {"ties": op.guarantees.ties}
    for exempt in EXEMPT:
        if (exempt.op, exempt.holds) == (op, holds):
            options |= exempt.where
    return drawn(**options)


@pytest.mark.parametrize(
    ("holds", "op"),
    [
        pytest.param(holds, op, id=f"{name}-{holds.__name__}")
        for name, op in OPERATORS.items()
        for holds in PROPERTIES
        if getattr(op.guarantees, holds.__name__)
    ],
)
@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=20, database=None)
def test_guarantee(holds, op, data):
    holds(op, data.draw(where(op, holds)))


@pytest.mark.parametrize(
    "exempt",
    [
        pytest.param(
            e, marks=pytest.mark.xfail(strict=True, reason=e.why), id=f"{e.op.__name__}-{e.holds.__name__}"
        )
        for e in EXEMPT
    ],
)
def test_where_a_promise_does_not_hold(exempt):
    scores = torch.tensor(exempt.scores, dtype=torch.float64)
    order = [*range(len(scores) - 2), len(scores) - 1, len(scores) - 2]
    exempt.holds(exempt.op, Drawn(Case(scores, exempt.k, exempt.temperature), order, 0.0, 0))


# The properties are able to fail


def of(function):
    return operator()(function)


def mask_of(s, k, t):
    return entropic.function(s, k, t)


def first_come(s, k, t):
    return mask_of(s + torch.arange(s.shape[-1]) / 100, k, t)


BROKEN = [
    (sums_to_k, of(lambda s, k, t: 1.001 * mask_of(s, k, t))),
    (bounded, of(lambda s, k, t: 1.9 * mask_of(s, k, t))),
    (monotone, of(lambda s, k, t: mask_of(-s, k, t))),
    (shift_invariant, of(lambda s, k, t: mask_of(s**3, k, t))),
    (equivariant, of(first_come)),
    (ties, of(first_come)),
    (rows_sum_to_1, of(lambda s, k, t: 1.001 * mask_of(s, k, t))),
    (infinite, of(lambda s, k, t: mask_of(s.clamp(-5, 5), k, t))),
    (sparse, of(mask_of)),
    (uniform_limit, of(lambda s, k, _: mask_of(s, k, 1.0))),
    (hard_limit, of(lambda s, k, _: mask_of(s, k, 1.0))),
]


@pytest.mark.parametrize(("holds", "op"), BROKEN, ids=lambda thing: getattr(thing, "__name__", ""))
def test_property_fails_on_a_broken_operator(holds, op):
    scores = torch.tensor([4.0, 0.5, 0.5, -60.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="temperature="):
        holds(op, Drawn(Case(scores, 1, 2.0), [2, 0, 3, 1], 8.0, 1))


def test_every_property_is_seen_to_fail():
    assert [holds for holds, _ in BROKEN] == PROPERTIES
