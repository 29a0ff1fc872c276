"""Our operators and estimators against public packages' own, in value and in gradient.

What our numbers are checked against, all in all:

    references.py        readable NumPy twins of ours, one row in double precision
    identities.py        pairs of functions that must agree
    entmax               sparsemax, alpha-entmax and the capped simplex: `sparsemax`, `entmax`, `pnorm`,
                         `scaled_entmax`
    jaxopt               box section: `sparsemax`
    optax                simplex: `sparsemax`; perturbations: `perturbed_mask`
    colt5-attention      coordinate descent, converged: `csoftmax`
    qfeval-functions     optimal transport with two anchors: `soft`, `entropic`
    difftopk             `softsort`, `neuralsort`, `splitter`; elementary symmetric polynomials: `marginals`
    diffsort             sorting networks: `odd_even`, `bitonic`
    POT                  Sinkhorn: `sinkhorn`
    ott-jax              Sinkhorn to m anchors: `sinkhorn_rank`
    torchsort            `soft_rank`
    softtorch            `softsort`
    pyepo                `perturbed_mask`, `ImplicitMLE`, `BlackBox`
    reinmax              `ReinMaxK` at k = 1
    torch                `softmax` at k = 1

Without a package its tests are skipped. `pip install -c constraints.txt -e '.[peers]'` brings all but two:
torchsort is compiled (`pip install setuptools wheel`, then `pip install --no-build-isolation torchsort`, with
no nvcc on the PATH or else all of CUDA), and softtorch asks for Python 3.12 (on 3.11 `pip install -c
constraints.txt --ignore-requires-python softtorch`).

There is no public package of `lapsum`, `gaussian`, `cauchy`, `dftopk`, `sigmoid`, `n3`, and of `softmax`
none but its special case. fast-soft-sort is not used: its KL gradient is wrong.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import peers
import pytest
import torch
from peers import close, draw, outcome
from torch import Tensor

from topkbench import operators
from topkbench.operators import Operator, csoftmax, entmax, entropic, pnorm, scaled_entmax, softmax, sparsemax
from topkbench.operators.anchors import sinkhorn_rank
from topkbench.operators.networks import bitonic, odd_even
from topkbench.operators.permutation import neuralsort, softsort
from topkbench.operators.ranks import soft_rank
from topkbench.operators.splitter import splitter
from topkbench.operators.subset import marginals
from topkbench.operators.transport import sinkhorn, soft

pytestmark = [
    pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Numba could not be imported:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),
]
ROUNDING = 1e-11  # some hundred roundings of a double
STEPS = ("logistic", "logistic_phi", "gaussian", "reciprocal", "cauchy", "optimal")


class Peer(NamedTuple):
    """`ours` and `theirs` of (scores, k, temperature) must agree to `tol`, absolutely and relatively."""

    name: str
    package: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    ks: tuple[int, ...] = (1, 2, 5)
    temperatures: tuple[float, ...] = (0.3, 1.0, 3.0)
    tol: float = ROUNDING
    n: int = 6
    dtype: torch.dtype = torch.float64


def _splitter(step: str, n: int) -> Peer:
    """The temperatures and tolerances are those of `_network`, for the same reasons."""
    return Peer(
        f"splitter {step} of {n}: difftopk",
        "difftopk",
        lambda s, k, t: splitter.selection(s, k, t, step=step),
        peers.difftopk_splitter(step),
        tuple(sorted({1, (n + 1) // 2, n})),
        (0.5, 1.0, 2.0),
        tol=1e-8 if step in ("logistic_phi", "optimal") else ROUNDING,
        n=n,
    )


def _network(ours: Operator, step: str, n: int) -> Peer:
    """The temperatures are powers of two, as its Gaussian step rounds 1 / steepness to single precision.

    Its phi and optimal steps add 1e-10 to what they divide by.
    """
    return Peer(
        f"{ours.__name__} {step} of {n}: diffsort",
        "diffsort",
        lambda s, k, t: ours.selection(s, k, t, step=step),
        peers.diffsort(ours.__name__, step),
        tuple(sorted({1, n - 1, n})),
        (0.5, 1.0, 2.0),
        tol=1e-8 if step in ("logistic_phi", "optimal") else ROUNDING,
        n=n,
    )


PEERS = [
    Peer("sparsemax: entmax.budget_bisect", "entmax", sparsemax, peers.entmax_budget),
    # It bisects to 1e-5 in the threshold; the gradient is that of the pieces and exact.
    Peer("sparsemax: jaxopt", "jaxopt", sparsemax, peers.jaxopt_box_section, (1, 2, 5), (0.5,), tol=2e-5),
    Peer("sparsemax: entmax.sparsemax", "entmax", sparsemax, peers.entmax_sparsemax, (1,)),
    Peer("sparsemax: optax", "optax", sparsemax, peers.optax_simplex, (1,)),
    Peer("entmax 1.5", "entmax", lambda s, k, t: entmax(s, k, t, alpha=1.5), peers.entmax_15, (1,)),
    *(
        Peer(
            f"entmax {alpha:.3g}",
            "entmax",
            lambda s, k, t, alpha=alpha: entmax(s, k, t, alpha=alpha),
            peers.entmax_bisect(alpha),
            (1,),
        )
        for alpha in (1.25, 4 / 3, 1.75, 2.0)
    ),
    # Theirs sums to 1.
    *(
        Peer(
            f"scaled_entmax {alpha:.3g}: {theirs.__name__}",
            "entmax",
            lambda s, k, t, alpha=alpha: scaled_entmax(s, k, t, alpha=alpha) / k,
            theirs,
        )
        for alpha, theirs in (
            (2.0, peers.entmax_sparsemax),
            (1.5, peers.entmax_15),
            *((alpha, peers.entmax_bisect(alpha)) for alpha in (1.25, 1.5, 1.75, 2.0)),
        )
    ),
    # The temperature of the p-norm is that of entmax over alpha - 1.
    *(
        Peer(
            f"pnorm {p:.3g}: entmax",
            "entmax",
            lambda s, k, t, p=p: pnorm(s, k, t / (p - 1), p=p),
            peers.entmax_bisect(p),
            (1,),
        )
        for p in (4 / 3, 1.5)
    ),
    Peer("csoftmax: colt5", "colt5_attention", csoftmax, peers.colt5),
    Peer(
        "soft: qfeval",
        "qfeval_functions",
        lambda s, k, t: soft(peers.as_qfeval(s), k, t, iterations=peers.CONVERGED),
        peers.qfeval,
    ),
    Peer(
        "entropic: qfeval",
        "qfeval_functions",
        lambda s, k, t: _entropic_of_costs(peers.as_qfeval(s), k, t),
        peers.qfeval,
    ),
    Peer("marginals: difftopk", "difftopk", marginals, peers.difftopk_subset),
    Peer("soft_rank: torchsort", "torchsort", soft_rank, peers.torchsort_rank("l2"), (1, 2, 5, 6)),
    Peer(
        "soft_rank kl: torchsort",
        "torchsort",
        lambda s, k, t: soft_rank(s, k, t, regularization="kl"),
        peers.torchsort_rank("kl"),
        (1, 2, 5, 6),
    ),
    Peer("softmax: torch", "torch", softmax, lambda s, _, t: (s / t).softmax(-1), (1,)),
    Peer("softsort: difftopk", "difftopk", softsort.selection, peers.difftopk_softsort, (1, 2, 6)),
    Peer("softsort: softtorch", "softtorch", softsort.selection, peers.softtorch_softsort, (1, 2, 6)),
    # A few roundings of logits of about 30 / temperature in single precision.
    Peer(
        "neuralsort: difftopk",
        "difftopk",
        neuralsort.selection,
        peers.difftopk_neuralsort,
        (1, 2, 6),
        tol=2e-4,
        dtype=torch.float32,
    ),
    # At a lower temperature even 2000 iterations do not get there.
    Peer(
        "sinkhorn: POT",
        "ot",
        lambda s, k, t: sinkhorn.selection(s, k, t, iterations=peers.CONVERGED),
        peers.pot_sinkhorn,
        (1, 2, 6),
        (1.0, 3.0),
        tol=1e-8,
    ),
    # At lower temperatures its gradient is not the derivative of its value, by 0.1 % at 0.1.
    *(
        Peer(
            f"sinkhorn_rank, {anchors} anchors: ott",
            "ott",
            lambda s, k, t, anchors=anchors: sinkhorn_rank(s, k, t, anchors=anchors, iterations=50),
            peers.ott_plan(anchors, 50),
            (2, 6),
            (1.0,),
        )
        for anchors in (4, 9)
    ),
    *(_splitter("cauchy", n) for n in (2, 3, 7, 16)),
    *(_splitter(step, 6) for step in STEPS),
    # A size that is no power of two lacks comparators.
    *(_network(op, "cauchy", n) for op in (odd_even, bitonic) for n in (2, 3, 7, 8)),
    *(_network(op, step, 6) for op in (odd_even, bitonic) for step in STEPS),
]


def _entropic_of_costs(scores, k, temperature):
    largest = torch.maximum(scores.square(), (scores - 1).square()).amax(-1, keepdim=True).detach()
    return entropic(scores, k, temperature * largest / 2)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peer(peer):
    pytest.importorskip(peer.package)
    for temperature in peer.temperatures:
        for k in peer.ks:
            scores = draw(4, peer.n, seed=k, dtype=peer.dtype)
            theirs = outcome(peer.theirs, scores, k, temperature)
            close(outcome(peer.ours, scores, k, temperature), theirs, peer.tol)


@pytest.mark.parametrize("anchors", [2, 9])
def test_sinkhorn_ranks_of_ott_at_a_low_temperature(anchors):
    """The value; before it converges the two differ, as its iterations start with the anchors."""
    pytest.importorskip("ott")
    theirs = peers.ott_plan(anchors, 500)(draw(4, 6), 2, 0.1)
    ours = sinkhorn_rank(draw(4, 6), 2, 0.1, anchors=anchors, iterations=500)
    torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


DISTRIBUTIONS = {
    "colt5_attention": "colt5-attention",
    "qfeval_functions": "qfeval-functions",
    "ot": "POT",
    "ott": "ott-jax",
}


@pytest.mark.parametrize("name", [name for name, op in vars(operators).items() if isinstance(op, Operator)])
def test_the_table_of_methods_names_the_packages_that_are_compared(name):
    claimed = set(getattr(operators, name).about.checked.partition("; ")[2].split(", ")) - {""}
    packages = {peer.package for peer in PEERS if re.match(rf"{name}\b", peer.name)} - {"torch"}
    assert claimed == {DISTRIBUTIONS.get(package, package) for package in packages}
