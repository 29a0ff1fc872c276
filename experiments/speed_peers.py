"""Public packages in `speed.py`, each at temperature 1 and else as it comes."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from speed_contenders import Call, Contender, Function, by_autograd
from torch import Tensor


def _entmax(**options: Any) -> Contender:
    def function(_like: Tensor, k: int) -> Function:
        import entmax

        return lambda s: entmax.budget_bisect(s, budget=k, dim=-1, **options)

    return Contender("peer", by_autograd(function), "entmax")


def _simple(package: str, function: Callable[[Any, Tensor, int], Tensor], module: str = "") -> Contender:
    def bound(_like: Tensor, k: int) -> Function:
        imported = importlib.import_module(module or package)
        return lambda s: function(imported, s, k)

    return Contender("peer", by_autograd(bound), package)


def _network(package: str, kind: str) -> Contender:
    def function(like: Tensor, k: int) -> Function:
        device, n = str(like.device), like.shape[-1]
        if package == "diffsort":
            import diffsort

            sort = diffsort.DiffSortNet(kind, n, device=device, steepness=1.0)
            return lambda s: sort(s)[1][..., -k:].sum(-1)
        import difftopk

        top = difftopk.DiffTopkNet(kind, n, k, device=device, steepness=1.0)
        return lambda s: top(s)[1].sum(-1)

    return Contender("peer", by_autograd(function), package)


def _pyepo(module: str, **options: Any) -> Contender:
    """With a top-k solver in NumPy: the package calls it row by row."""

    def function(like: Tensor, k: int) -> Function:
        import pyepo

        n = like.shape[-1]

        class TopK(pyepo.model.opt.optModel):
            modelSense = pyepo.EPO.MAXIMIZE

            def _getModel(self) -> tuple[None, list[int]]:
                return None, list(range(n))

            def setObj(self, c: Any) -> None:
                self.cost = np.asarray(c)

            def solve(self) -> tuple[np.ndarray, float]:
                mask = np.zeros(n, self.cost.dtype)
                mask[np.argpartition(self.cost, n - k)[n - k :]] = 1
                return mask, float(mask @ self.cost)

        return getattr(pyepo.func, module)(TopK(), **options)

    return Contender("peer", by_autograd(function), "pyepo", devices=("cpu",))


def _jax(package: str, mask: Callable[[Any, int], Any]) -> Contender:
    """A row's mask, under vmap, value and gradient in one jitted program."""

    def make(scores: Tensor, k: int) -> Call:
        import jax
        import jax.numpy as jnp

        device = jax.devices("gpu" if scores.is_cuda else "cpu")[0]
        x = jax.device_put(jnp.asarray(scores.cpu().numpy()), device)
        g = jax.device_put(jnp.asarray(torch.randn(scores.shape).numpy()), device)

        def both(x: Any, g: Any) -> Any:
            value, pullback = jax.vjp(jax.vmap(lambda row: mask(row, k)), x)
            return value, pullback(g)[0]

        program = jax.jit(both).lower(x, g).compile()
        sizes = program.memory_analysis()
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
        return Call(lambda: jax.block_until_ready(program(x, g)), held=held)

    return Contender("peer", make, package)


def _box_section(row: Any, k: int) -> Any:
    import jax.numpy as jnp
    from jaxopt.projection import projection_box_section

    ones = jnp.ones_like(row)
    return projection_box_section(row, (jnp.zeros_like(row), ones, ones, float(k)))


def _perturbed(row: Any, k: int) -> Any:
    import jax
    import jax.numpy as jnp
    from optax.perturbations import Normal, make_perturbed_fun

    def hard(x: Any) -> Any:
        return jnp.zeros_like(x).at[jax.lax.top_k(x, k)[1]].set(1.0)

    return make_perturbed_fun(hard, num_samples=10, sigma=1.0, noise=Normal())(jax.random.key(0), row)


def _ranks(torchsort: Any, s: Tensor, k: int) -> Tensor:
    """A mask from ascending soft ranks."""
    return (torchsort.soft_rank(s) - (s.shape[-1] - k) + 0.5).clamp(0, 1)


def _softtorch(method: str) -> Contender:
    return _simple(
        "softtorch",
        lambda st, s, k: st.topk(s, k, softness=1.0, method=method, standardize=False).indices.sum(-2),
    )


PEERS: Mapping[str, Contender] = {
    "entmax.budget_bisect": _entmax(),
    "entmax.budget_bisect(n_iter=24)": _entmax(n_iter=24),
    "entmax.sparsemax (k=1)": _simple("entmax", lambda m, s, _: m.sparsemax(s, dim=-1)),
    "jaxopt.projection_box_section": _jax("jaxopt", _box_section),
    "torchsort.soft_rank clipped": _simple("torchsort", _ranks),
    "difftopk.SoftSort": _simple("difftopk", lambda m, s, k: m.SoftSort()(s)[:, :k].sum(-2)),
    "difftopk.NeuralSort": _simple("difftopk", lambda m, s, k: m.NeuralSort()(s)[..., -k:].sum(-1)),
    "difftopk.DiffTopkNet(bitonic)": _network("difftopk", "bitonic"),
    "diffsort.DiffSortNet(bitonic)": _network("diffsort", "bitonic"),
    "diffsort.DiffSortNet(odd_even)": _network("diffsort", "odd_even"),
    "softtorch.topk(softsort)": _softtorch("softsort"),
    "softtorch.topk(neuralsort)": _softtorch("neuralsort"),
    "softtorch.topk(ot)": _softtorch("ot"),
    "qfeval.soft_topk": _simple(
        "qfeval_functions", lambda m, s, k: m.soft_topk(s, k, epsilon=1.0), "qfeval_functions.functions"
    ),
    "colt5.coor_descent": _simple(
        "colt5_attention",
        lambda m, s, k: m.coor_descent(s, n_iters=20, k=k, eps=1.0),
        "colt5_attention.coor_descent",
    ),
    "pyepo.perturbedOpt(10)": _pyepo("perturbedOpt", n_samples=10),
    "pyepo.implicitMLE(10)": _pyepo("implicitMLE", n_samples=10),
    "pyepo.blackboxOpt": _pyepo("blackboxOpt"),
    "optax.perturbations(10)": _jax("optax", _perturbed),
    "reinmax (k=1)": _simple("reinmax", lambda m, s, _: m.reinmax(s, 1.0)[0]),
}
