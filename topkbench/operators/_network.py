"""Relaxed sorting networks: the k needed rows of the product of all layers, and their VJP.

A layer compares pairs (a, b) of wires and exchanges them by the share c = F(a - b):

    a' = (1 - c) a + c b,    b' = c a + (1 - c) b

so it is a symmetric, doubly stochastic matrix L(c), and the network sorts x upwards: x_l = L_l x_{l-1}. The
relaxed permutation is P = L_m ... L_1, and a combination e^T P of its rows needs no more than m products with
a vector, from the last layer to the first: y_m = e, y_{l-1} = L_l y_l. With e the last k wires that is
the mask; the k unit vectors give the rows.

Vector-Jacobian product for G = dL/dy_0. With the difference D = a - b, in each layer:
g_l = L_l g_{l-1} from g_0 = G, then from the last layer to the first, starting at h = 0,

    t = F'(D) * ((g_a - g_b)(y_a - y_b) + (h_a - h_b) D) + c (h_a - h_b),    h_a -= t,  h_b += t

with g before and y after the layer; h ends as dL/dx. Tensors are `(wires, columns, rows of scores)`: a pair
of wires is two long runs of memory, whatever the layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topkbench.operators._contract import check_size
from topkbench.operators._layers import Layer, Network
from topkbench.operators._order import arrange, arranged, restore
from topkbench.operators._steps import Step

FAR = 1e15  # scores further out than that many temperatures, infinite ones too, are put there


@dataclass(frozen=True)
class Job:
    """What is asked of a network: its last k rows one by one, or their sum."""

    network: Network
    step: Step
    rows: bool


def run(u: Tensor, k: int | Tensor, job: Job) -> Tensor:
    """The mask `(..., n)`, or the rows `(..., k, n)`, of scores in units of the temperature."""
    if isinstance(k, Tensor):
        k = k.expand(u.shape[:-1])
    columns = k if job.rows and isinstance(k, int) else 1
    numbers = job.network.comparators * columns * math.prod(u.shape[:-1])
    check_size(numbers, u, f"what is kept of {job.network.comparators} comparators")
    return _Network.apply(u, k, job)[0]


def _turned(x: Tensor, turn: tuple[int, int, int] | None) -> Tensor:
    """The part of x that changes sign."""
    assert turn is not None
    size, low, high = turn
    return x.view(len(x) // size, size, *x.shape[1:])[:, low:high]


def _ends(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    start, stop, half = layer[:3]
    shape = (2,) if half == 1 else (2, half)
    a, b = x[start:stop].view((stop - start) // (2 * half), *shape, *x.shape[1:]).unbind(1)
    return a, b


def _all_ends(x: Tensor, layers: Sequence[Layer]) -> list[tuple[Tensor, Tensor]]:
    """The two ends of each layer's comparators, as views; layers of the same shape share them."""
    known = {layer[:3]: layer for layer in layers}
    views = {shape: _ends(x, layer) for shape, layer in known.items()}
    return [views[layer[:3]] for layer in layers]


def _parts(flat: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """What belongs to the comparators of each layer, shaped as their ends."""
    parts = flat.split([(layer.stop - layer.start) // 2 for layer in layers])
    return [
        part if layer.half == 1 else part.view(len(part) // layer.half, layer.half, *flat.shape[1:])
        for part, layer in zip(parts, layers, strict=True)
    ]


def _sort(x: Tensor, differences: list[Tensor], shares: list[Tensor], job: Job) -> None:
    """Run the scores through the network, in place, and write down differences and shares."""
    layers = job.network.layers
    for layer, (a, b), d, c in zip(layers, _all_ends(x, layers), differences, shares, strict=True):
        arrange(x, layer)
        if layer.turn:
            _turned(x, layer.turn).neg_()
        torch.sub(a, b, out=d)
        job.step.cdf(d, out=c)
        if layer.still:
            c[0, : layer.still].zero_()
        # An exact exchange where c is 0 or 1, however far apart the two are.
        other = torch.lerp(b, a, c)
        a.lerp_(b, c)
        b.copy_(other)


def _mix(x: Tensor, differences: Tensor, shares: Tensor, job: Job, *, backwards: bool) -> None:
    """Multiply by layer after layer, in place, and write down the differences met on the way."""
    layers = job.network.layers
    parts = (_parts(flat, layers) for flat in (differences, shares))
    terms = list(zip(layers, _all_ends(x, layers), *parts, strict=True))
    for layer, (a, b), d, c in reversed(terms) if backwards else terms:
        if not backwards:
            arrange(x, layer)
        torch.sub(a, b, out=d)
        a.addcmul_(d, c, value=-1)
        b.addcmul_(d, c)
        if backwards:
            restore(x, layer)


def _last_wires(k: int | Tensor, job: Job, like: Tensor) -> Tensor:
    """The last k wires, as unit vectors or as their sum: (wires, columns, rows of scores)."""
    wires, count = job.network.wires, like.shape[-1]
    if isinstance(k, Tensor):
        rank = torch.arange(wires - 1, -1, -1, device=k.device).view(-1, 1, 1)
        return (rank < k.reshape(-1)).to(like.dtype)
    last = like.new_zeros(wires, k if job.rows else 1, count)
    if job.rows:
        last[wires - k :] = torch.eye(k, dtype=like.dtype, device=like.device).flip(0).unsqueeze(-1)
    else:
        last[wires - k :].fill_(1)
    return last


def _wires_first(part: Tensor, rows: bool) -> Tensor:
    """(..., n), or of rows (..., k, n), to (n, columns, rows of scores)."""
    leading = part.shape[: -2 if rows else -1]
    columns = part.shape[-2] if rows else 1
    return part.reshape(math.prod(leading), columns, part.shape[-1]).permute(2, 1, 0)


def _wires_last(wires: Tensor, leading: Sequence[int], rows: bool) -> Tensor:
    part = wires.permute(2, 1, 0) if rows else wires[:, 0].T
    return part.reshape(*leading, *part.shape[1:])


def _forward(u: Tensor, k: int | Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    network, leading = job.network, u.shape[:-1]
    layers, flat = network.layers, _wires_first(u, False)
    x = flat.new_zeros(network.wires, *flat.shape[1:])
    torch.clamp(flat, -FAR, FAR, out=x[network.padding :])
    y = _last_wires(k, job, x)
    differences, shares = x.new_empty(2, network.comparators, *x.shape[1:]).unbind()
    mixed = y.new_empty(network.comparators, *y.shape[1:])
    _sort(x, _parts(differences, layers), _parts(shares, layers), job)
    _mix(y, mixed, shares, job, backwards=True)
    output = _wires_last(y[network.padding :], leading, job.rows)
    d, c, met = (part.view(*part.shape[:2], *leading) for part in (differences, shares, mixed))
    return output, d, c, met


def _backward(grad: Tensor, saved: Sequence[Tensor], job: Job) -> Tensor:
    network, leading = job.network, grad.shape[: -2 if job.rows else -1]
    layers = network.layers
    flat = _wires_first(grad, job.rows)
    differences, shares, mixed = (part.reshape(*part.shape[:2], flat.shape[-1]) for part in saved)
    g = flat.new_zeros(network.wires, *flat.shape[1:])
    g[network.padding :] = flat
    products = torch.empty_like(mixed)
    _mix(g, products, shares, job, backwards=False)
    slopes = job.step.slope(differences, shares)
    if any(layer.still for layer in layers):
        for layer, slope in zip(layers, _parts(slopes, layers), strict=True):
            slope[0, : layer.still] = 0
    pushes = products.mul_(mixed)
    pushes = (pushes.sum(1, keepdim=True) if job.rows else pushes).mul_(slopes)
    pulls = torch.addcmul(shares, slopes, differences, out=slopes)
    h = g.new_zeros(network.wires, 1, g.shape[-1])
    terms = zip(layers, _all_ends(h, layers), _parts(pushes, layers), _parts(pulls, layers), strict=True)
    for layer, (a, b), push, pull in reversed(list(terms)):
        t = push.addcmul_(pull, a - b)
        a.sub_(t)
        b.add_(t)
        if layer.turn:
            _turned(h, layer.turn).neg_()
        restore(h, layer)
    return _wires_last(h[network.padding :], leading, False)


def plain(u: Tensor, k: int | Tensor, job: Job) -> Tensor:
    """The same by plain operations: what second derivatives are taken of."""
    network = job.network
    flat = _wires_first(u, False).clamp(-FAR, FAR)
    x = torch.cat([flat.new_zeros(network.padding, *flat.shape[1:]), flat])
    shares = []
    for layer in network.layers:
        x = arranged(x, layer)
        if layer.turn:
            size, low, high = layer.turn
            blocks = x.view(len(x) // size, size, *x.shape[1:])
            turned = [blocks[:, :low], -blocks[:, low:high], blocks[:, high:]]
            x = torch.cat(turned, 1).reshape(x.shape)
        a, b = _ends(x, layer)
        c = job.step.cdf(a - b).reshape((layer.stop - layer.start) // 2, *x.shape[1:])
        c = torch.cat([torch.zeros_like(c[: layer.still]), c[layer.still :]]).view(a.shape)
        shares.append(c)
        x = _exchanged(x, layer, c)
    y = _last_wires(k, job, flat)
    for layer, c in zip(reversed(network.layers), reversed(shares), strict=True):
        y = arranged(_exchanged(y, layer, c), layer, back=True)
    return _wires_last(y[network.padding :], u.shape[:-1], job.rows)


def _exchanged(x: Tensor, layer: Layer, c: Tensor) -> Tensor:
    a, b = _ends(x, layer)
    pairs = torch.stack([torch.lerp(a, b, c), torch.lerp(b, a, c)], 1)
    pairs = pairs.reshape(layer.stop - layer.start, *x.shape[1:])
    return torch.cat([x[: layer.start], pairs, x[layer.stop :]])


class _Network(torch.autograd.Function):
    """u -> the output, and for the backward pass D, c and the y_a - y_b: (comparators, columns, ...)."""

    @staticmethod
    def forward(u: Tensor, k: int | Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(u, k, job)

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
            return _backward(grad, ctx.saved_tensors[1:], ctx.job), None, None
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
        return _backward(grad, (d, c, y), job)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        grad, u, _d, _c, _y, ctx.k, ctx.job = inputs
        ctx.save_for_backward(grad, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def vjp(cotangent: Tensor, u: Tensor) -> Tensor:
            return torch.func.vjp(lambda v: plain(v, ctx.k, ctx.job), u)[1](cotangent)[0]

        return *torch.func.vjp(vjp, *ctx.saved_tensors)[1](grad), *(None,) * 5

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
