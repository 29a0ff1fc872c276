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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topkbench.operators._contract import check_size
from topkbench.operators._layers import Layer, Network, bitonic_network, odd_even_network
from topkbench.operators._order import arrange, arranged, restore
from topkbench.operators._splitter import splitter_network
from topkbench.operators._steps import Step, step_named

FAR = 1e15  # scores further out than that many temperatures, infinite ones too, are put there


NETWORKS: dict[str, Callable[[int, int], Network]] = {
    "odd_even": lambda n, _: odd_even_network(n),
    "bitonic": lambda n, _: bitonic_network(n),
    "splitter": splitter_network,
}


@dataclass(frozen=True)
class Job:
    """What is asked of which network, in words and numbers alone: so a compiled program can hold it.

    Not a tuple, which vmap would take apart.

    Attributes:
        kind: One of NETWORKS.
        n: Of how many scores.
        most: Which k a network that does not sort must be good for.
        how: The name of the step.
        art: Its power.
        rows: Whether the last k rows are wanted one by one; else their sum.
    """

    kind: str
    n: int
    most: int
    how: str
    art: float
    rows: bool

    @property
    def parts(self) -> tuple[str, int, int, str, float, bool]:
        """All of it, in order."""
        return self.kind, self.n, self.most, self.how, self.art, self.rows

    @property
    def network(self) -> Network:
        """The layers."""
        return NETWORKS[self.kind](self.n, self.most)

    @property
    def step(self) -> Step:
        """How a comparator exchanges."""
        return step_named(self.how, self.art)


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


def mixed(u: Tensor, k: int | Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and for its VJP D, c and the y_a - y_b: `(comparators, columns, ...)`.

    Raises:
        ValueError: what is kept does not fit.
    """
    network, leading = job.network, u.shape[:-1]
    columns = k if job.rows and isinstance(k, int) else 1
    numbers = network.comparators * columns * math.prod(leading)
    check_size(numbers, u, f"what is kept of {network.comparators} comparators")
    layers, flat = network.layers, _wires_first(u, False)
    x = flat.new_zeros(network.wires, *flat.shape[1:])
    torch.clamp(flat, -FAR, FAR, out=x[network.padding :])
    y = _last_wires(k, job, x)
    differences, shares = (x.new_empty(network.comparators, *x.shape[1:]) for _ in range(2))
    met = y.new_empty(network.comparators, *y.shape[1:])
    _sort(x, _parts(differences, layers), _parts(shares, layers), job)
    _mix(y, met, shares, job, backwards=True)
    output = _wires_last(y[network.padding :], leading, job.rows)
    d, c, m = (part.view(*part.shape[:2], *leading) for part in (differences, shares, met))
    return output, d, c, m


def vjp(grad: Tensor, saved: Sequence[Tensor], job: Job) -> Tensor:
    """The vector-Jacobian product, from what `mixed` gave beside the output."""
    network, leading = job.network, grad.shape[: -2 if job.rows else -1]
    layers = network.layers
    flat = _wires_first(grad, job.rows)
    differences, shares, met = (part.reshape(*part.shape[:2], flat.shape[-1]) for part in saved)
    g = flat.new_zeros(network.wires, *flat.shape[1:])
    g[network.padding :] = flat
    products = torch.empty_like(met)
    _mix(g, products, shares, job, backwards=False)
    slopes = job.step.slope(differences, shares)
    if any(layer.still for layer in layers):
        for layer, slope in zip(layers, _parts(slopes, layers), strict=True):
            slope[0, : layer.still] = 0
    pushes = products.mul_(met)
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
