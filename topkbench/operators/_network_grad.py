"""A relaxed sorting network for autograd, for vmap and for a compiler.

The layers work in place on slices of one tensor. A compiler that follows them writes each down as an
expression of all before it: that took half an hour at 16 scores, and the splitter came out as zeros. So to a
compiler a network is one operation, and its vector-Jacobian product another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topkbench.operators._loop import own
from topkbench.operators._network import NETWORKS, Job, mixed, plain, vjp

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def run(u: Tensor, k: int | Tensor, job: Job) -> Tensor:
    """The mask `(..., n)`, or the rows `(..., k, n)`, of scores in units of the temperature."""
    if isinstance(k, Tensor):
        k = k.expand(u.shape[:-1])
    return _Network.apply(u, k, job)[0]


def _mixed(u: Tensor, k: int | Tensor, job: Job) -> Parts:
    if not torch.compiler.is_compiling():
        return mixed(u, k, job)
    return _network(u, k if isinstance(k, Tensor) else None, *job.parts)


def _product(grad: Tensor, kept: Sequence[Tensor], job: Job) -> Tensor:
    return _network_vjp(grad, *kept, *job.parts) if torch.compiler.is_compiling() else vjp(grad, kept, job)


@torch.library.custom_op("topkbench::network", mutates_args=())
def _network(
    u: Tensor,
    ks: Tensor | None,  # if None, k is `most`
    kind: str,
    n: int,
    most: int,
    how: str,
    art: float,
    rows: bool,
) -> Parts:
    output, d, c, met = mixed(u, most if ks is None else ks, Job(kind, n, most, how, art, rows))
    return own(output), d, c, met


@_network.register_fake
def _(u: Tensor, ks: Tensor | None, *job: Any) -> Parts:
    kind, n, most, *_, rows = job
    comparators = NETWORKS[kind](int(n), int(most)).comparators
    leading, columns = u.shape[:-1], most if rows and ks is None else 1
    output = u.new_empty(*leading, *([most] if rows else []), n)
    d, c, met = (u.new_empty(comparators, width, *leading) for width in (1, 1, columns))
    return output, d, c, met


@_network.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *inputs: Any) -> tuple[Parts, tuple[int, ...]]:
    moved = _batched(info.batch_size, inputs[:2], axes, (0, 0))
    return _network(*moved, *inputs[2:]), (0, 2, 2, 2)


@torch.library.custom_op("topkbench::network_vjp", mutates_args=())
def _network_vjp(
    grad: Tensor,
    d: Tensor,
    c: Tensor,
    met: Tensor,
    kind: str,
    n: int,
    most: int,
    how: str,
    art: float,
    rows: bool,
) -> Tensor:
    return own(vjp(grad, (d, c, met), Job(kind, n, most, how, art, rows)))


@_network_vjp.register_fake
def _(grad: Tensor, *kept_and_job: Any) -> Tensor:
    rows = kept_and_job[-1]
    return grad.new_empty(*grad.shape[: -2 if rows else -1], grad.shape[-1])


@_network_vjp.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    moved = _batched(info.batch_size, inputs[:4], axes, (0, 2, 2, 2))
    return _network_vjp(*moved, *inputs[4:]), 0


class _Network(torch.autograd.Function):
    """u -> the output, and for the backward pass D, c and the y_a - y_b: (comparators, columns, ...)."""

    @staticmethod
    def forward(u: Tensor, k: int | Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _mixed(u, k, job)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        u, ctx.k, ctx.job = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            return _product(grad, ctx.saved_tensors[1:], ctx.job), None, None
        return _Vjp.apply(grad, *ctx.saved_tensors, ctx.k, ctx.job), None, None

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *inputs: Any) -> tuple[Any, tuple[int, ...]]:
        u, k = _batched(info.batch_size, inputs[:2], axes, (0, 0))
        return _Network.apply(u, k, inputs[-1]), (0, 2, 2, 2)


class _Vjp(torch.autograd.Function):
    """(G, u, what was saved) -> the vector-Jacobian product; its own derivatives by plain operations."""

    @staticmethod
    def forward(
        grad: Tensor, _u: Tensor, d: Tensor, c: Tensor, y: Tensor, _k: int | Tensor, job: Job
    ) -> Tensor:
        return _product(grad, (d, c, y), job)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        grad, u, _d, _c, _y, ctx.k, ctx.job = inputs
        ctx.save_for_backward(grad, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def product(cotangent: Tensor, u: Tensor) -> Tensor:
            return torch.func.vjp(lambda v: plain(v, ctx.k, ctx.job), u)[1](cotangent)[0]

        return *torch.func.vjp(product, *ctx.saved_tensors)[1](grad), *(None,) * 5

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        moved = _batched(info.batch_size, inputs[:-1], axes, (0, 0, 2, 2, 2, 0))
        return _Vjp.apply(*moved, inputs[-1]), 0


def _batched(
    size: int, inputs: Sequence[Any], axes: Sequence[int | None], places: Sequence[int]
) -> list[Any]:
    """Tensors with the axis of vmap moved from `axes` to `places`, or made there; the rest as it is."""
    moved = []
    for thing, here, to in zip(inputs, axes, places, strict=False):
        if not isinstance(thing, Tensor):
            moved.append(thing)
        elif here is None:
            moved.append(thing.unsqueeze(to).expand(*thing.shape[:to], size, *thing.shape[to:]))
        else:
            moved.append(thing.movedim(here, to))
    return moved
