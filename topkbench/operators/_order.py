"""Putting wires in the order in which a layer wants them: what sits side by side can be compared at once."""

import torch
from torch import Tensor

from topkbench.operators._layers import Layer


def arrange(x: Tensor, layer: Layer) -> None:
    """Put the wires `(wires, ...)` in the order of the layer, in place."""
    if layer.order is not None:
        tail = x[len(x) - len(layer.order) :]
        tail.copy_(tail[_index(layer, x)])


def restore(x: Tensor, layer: Layer) -> None:
    """Undo `arrange`, in place: the product with the transposed permutation."""
    if layer.order is not None:
        tail = x[len(x) - len(layer.order) :]
        tail.index_copy_(0, _index(layer, x), tail.clone())


def arranged(x: Tensor, layer: Layer, *, back: bool = False) -> Tensor:
    """What either of the two makes of the wires, which stay as they are."""
    if layer.order is None:
        return x
    index, rest = _index(layer, x), len(x) - len(layer.order)
    return torch.cat([x[:rest], x[rest:][index.argsort() if back else index]])


def _index(layer: Layer, like: Tensor) -> Tensor:
    return torch.from_numpy(layer.order).to(like.device)
