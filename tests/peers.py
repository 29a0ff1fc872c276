"""Public packages' own top-k, brought to our conventions: differentiable f(scores (rows, n), k, temperature).

Each gives the mask `(rows, n)` or, below "Selections", `(rows, k, n)` with the largest score first. Where
a convention is easily mistaken, its adapter names it. Packages are imported where they are used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Adapted = Callable[[Tensor, int, float], Tensor]
CONVERGED = 2000  # iterations of what approaches its fixed point linearly


# entmax: no temperature, so that the scores are divided by it


def entmax_budget(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Its backward pass takes the last dimension only as -1, and none of size 1 before it."""
    import entmax

    # Every step halves an interval as wide as the scores; 60 use up the digits of a double.
    return entmax.budget_bisect(scores / temperature, budget=k, dim=-1, n_iter=60)


def entmax_sparsemax(scores: Tensor, k: int, temperature: float) -> Tensor:
    """k = 1."""
    import entmax

    return entmax.sparsemax(scores / temperature, dim=-1)


def entmax_15(scores: Tensor, k: int, temperature: float) -> Tensor:
    """k = 1."""
    import entmax

    return entmax.entmax15(scores / temperature, dim=-1)


def entmax_bisect(alpha: float) -> Adapted:
    """k = 1, `relu((alpha - 1) s - t)^(1 / (alpha - 1))`: the scores count (alpha - 1) times."""

    def mask(scores: Tensor, k: int, temperature: float) -> Tensor:
        import entmax

        return entmax.entmax_bisect(scores / temperature, alpha=alpha, dim=-1, n_iter=60)

    return mask


# JAX: a function of one row, under vmap and in double precision


class _ThroughJax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, function: Callable[[Any], Any]) -> Tensor:
        import jax
        import jax.numpy as jnp

        with jax.enable_x64(True):
            output, ctx.pullback = jax.vjp(jax.vmap(function), jnp.asarray(scores.numpy()))
            return torch.tensor(jax.device_get(output))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        import jax
        import jax.numpy as jnp

        with jax.enable_x64(True):
            return torch.tensor(jax.device_get(ctx.pullback(jnp.asarray(grad.numpy()))[0])), None


def jaxopt_box_section(scores: Tensor, k: int, temperature: float) -> Tensor:
    """`hyperparams` are lower and upper bound, weights and budget, in this order."""
    import jax.numpy as jnp
    from jaxopt.projection import projection_box_section

    def mask(row: Any) -> Any:
        ones = jnp.ones_like(row)
        return projection_box_section(row / temperature, (jnp.zeros_like(row), ones, ones, float(k)))

    return _ThroughJax.apply(scores, mask)


def optax_simplex(scores: Tensor, k: int, temperature: float) -> Tensor:
    """k = 1: with scale=k an entry may exceed 1, which is another operator."""
    from optax.projections import projection_simplex

    return _ThroughJax.apply(scores, lambda row: projection_simplex(row / temperature))


# Masks by iteration


def colt5(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Its own 20 or 50 steps leave the sum off k, and its `topk` asks for 9/8 k; this is the fixed point."""
    from colt5_attention.coor_descent import coor_descent

    return coor_descent(scores, n_iters=CONVERGED, k=k, eps=temperature)


def qfeval(scores: Tensor, k: int, temperature: float) -> Tensor:
    """It standardises the scores first, and has anchors -1 and 1: see `as_qfeval`."""
    from qfeval_functions.functions import soft_topk

    return soft_topk(scores, k, epsilon=temperature, max_iter=CONVERGED)


def as_qfeval(scores: Tensor) -> Tensor:
    """Standardised scores, moved so that its anchors are 0 and 1; the largest cost is divided out."""
    centred = scores - scores.mean(-1, keepdim=True)
    return (centred / scores.std(-1, keepdim=True) + 1) / 2


def difftopk_subset(scores: Tensor, k: int, temperature: float) -> Tensor:
    """The gradient of its log elementary symmetric polynomial (Berrada et al. 2018), by autograd."""
    from difftopk.smooth_topk import Multiplication, divide_and_conquer

    with torch.enable_grad():
        x = scores / temperature
        # prod (z + e^-x) holds e_k(e^x) / e_n(e^x) as its coefficient of z^k.
        logarithms = divide_and_conquer([-x.mT, torch.zeros_like(x.mT)], k, Multiplication(k))
        total = (logarithms.reshape(k + 1, -1)[k] + x.sum(-1)).sum()
        return torch.autograd.grad(total, x, create_graph=True)[0]


def torchsort_rank(regularization: str) -> Adapted:
    """Ranks of -scores, as its rank 1 is the smallest; clipped as ours."""

    def mask(scores: Tensor, k: int, temperature: float) -> Tensor:
        import torchsort

        ranks = torchsort.soft_rank(-scores, regularization, regularization_strength=temperature)
        return (k + 1 - ranks).clamp(0, 1)

    return mask


# Selections


def difftopk_softsort(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Rows, largest first."""
    import difftopk

    return difftopk.SoftSort(tau=temperature)(scores)[:, :k]


def softtorch_softsort(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Rows, largest first; without its own standardisation of the scores."""
    import softtorch

    found = softtorch.topk(scores, k, softness=temperature, method="softsort", standardize=False)
    return found.indices


def difftopk_neuralsort(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Columns, smallest first; in single precision only, as its constants are."""
    import difftopk

    return difftopk.NeuralSort(tau=temperature)(scores)[..., -k:].flip(-1).mT


def diffsort(network: str, distribution: str) -> Adapted:
    """Columns, smallest first. Its steepness is 1 / temperature."""

    def selection(scores: Tensor, k: int, temperature: float) -> Tensor:
        import diffsort

        kind = {"steepness": 1 / temperature, "distribution": distribution}
        _, matrix = diffsort.DiffSortNet(network, scores.shape[-1], **kind)(scores)
        return matrix[..., -k:].flip(-1).mT

    return selection


def difftopk_splitter(step: str) -> Adapted:
    """Columns, smallest first. Its layers in its dense product, as the sparse one needs torch_sparse.

    It makes constants of the default precision.
    """

    def selection(scores: Tensor, k: int, temperature: float) -> Tensor:
        from difftopk.functional import execute_topk
        from difftopk.networks import sparse_splitter_selection_network

        layers = sparse_splitter_selection_network(scores.shape[-1], k)
        network = [[torch.from_numpy(matrix) for matrix in layer[:4]] for layer in layers]
        before = torch.get_default_dtype()
        torch.set_default_dtype(scores.dtype)
        try:
            _, matrix = execute_topk(network, scores, k, 1 / temperature, 0.25, step)
        finally:
            torch.set_default_dtype(before)
        return matrix.flip(-1).mT

    return selection


def ott_plan(anchors: int, iterations: int) -> Adapted:
    """The plan of its soft sort to m anchors, smallest first; with m of n / k anchors, the top k of it."""

    def mask(scores: Tensor, k: int, temperature: float) -> Tensor:
        import jax.numpy as jnp
        from ott.tools.soft_sort import transport_for_sort

        n = scores.shape[-1]
        fixed = {"min_iterations": iterations, "max_iterations": iterations, "implicit_diff": None}

        def taken(row: Any) -> Any:
            evenly = (jnp.ones(size) / size for size in (n, anchors))
            plan = transport_for_sort(row, *evenly, epsilon=temperature, threshold=0.0, **fixed).matrix
            share = jnp.clip(anchors * k / n - jnp.arange(anchors)[::-1], 0, 1)
            return n * plan @ share

        return _ThroughJax.apply(scores, taken)

    return mask


def pot_sinkhorn(scores: Tensor, k: int, temperature: float) -> Tensor:
    """The plan of the cost `j s` between masses 1, of a row at a time, to convergence; by autograd."""
    import ot

    n = scores.shape[-1]
    ones, ranks = scores.new_ones(n), torch.arange(1, n + 1, dtype=scores.dtype).unsqueeze(-1)
    options = {"method": "sinkhorn_log", "numItermax": CONVERGED, "stopThr": 1e-14, "warn": False}
    return torch.stack([ot.sinkhorn(ones, ones, ranks * row, temperature, **options)[:k] for row in scores])


# Estimators, with the noise given


def pyepo_solver(n: int, k: int) -> Any:
    """The hard top-k as its solver. It minimises unless told otherwise."""
    import numpy as np
    import pyepo

    class TopK(pyepo.model.opt.optModel):
        modelSense = pyepo.EPO.MAXIMIZE

        def _getModel(self) -> tuple[None, list[int]]:
            return None, list(range(n))

        def setObj(self, c: Any) -> None:
            self.cost = np.asarray(c)

        def solve(self) -> tuple[Any, float]:
            mask = np.zeros(n)
            mask[np.argsort(self.cost)[n - k :]] = 1
            return mask, float(mask @ self.cost)

    return TopK()


def optax_perturbed(samples: int) -> tuple[Adapted, Callable[[Tensor], Tensor]]:
    """The mean over draws, and the draws `(samples, rows, n)` that it makes.

    Without its baseline, the mask at the scores themselves: ours is the mean of the other draws.
    """

    def mask(scores: Tensor, k: int, temperature: float) -> Tensor:
        import jax
        import jax.numpy as jnp
        from optax.perturbations import Normal, make_perturbed_fun

        def hard(row: Any) -> Any:
            return jnp.zeros_like(row).at[jax.lax.top_k(row, k)[1]].set(1)

        options = {"sigma": temperature, "noise": Normal(), "use_baseline": False}
        noisy = make_perturbed_fun(hard, samples, **options)
        return _ThroughJax.apply(scores, lambda row: noisy(jax.random.key(0), row))

    def draws(scores: Tensor) -> Tensor:
        import jax
        import jax.numpy as jnp
        import optax

        with jax.enable_x64(True):
            row = jnp.zeros(scores.shape[-1])
            normal = optax.perturbations.Normal().sample
            drawn = jax.vmap(lambda key: optax.tree.random_like(key, row, sampler=normal))(
                jax.random.split(jax.random.key(0), samples)
            )
            return torch.tensor(jax.device_get(drawn)).unsqueeze(1).expand(-1, *scores.shape)

    return mask, draws


# What is compared


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outcome(function, scores, *arguments):
    """The value, and the gradient of its product with fixed normal numbers."""
    leaf = scores.clone().requires_grad_()
    value = function(leaf, *arguments)
    upstream = draw(*value.shape, seed=1, dtype=value.dtype)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


def close(ours, theirs, tol):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tol, atol=tol)
