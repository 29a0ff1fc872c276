"""What the vmap rule of an operator over any leading dimensions needs: the new one in front of the others."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def in_front(
    size: int, values: Sequence[Any], dims: Sequence[int | None], trailing: Sequence[int]
) -> list[Any]:
    """The tensors with vmap's dimension in front, then equally many leading dimensions; the rest as it is.

    Args:
        size: How long vmap's dimension is.
        values: Tensors, and what is none.
        dims: Where each has vmap's dimension.
        trailing: How many of the last dimensions of each are no leading ones.
    """
    triples = list(zip(values, dims, trailing, strict=True))
    leading = max(v.dim() - own - (dim is not None) for v, dim, own in triples if isinstance(v, Tensor))
    moved = []
    for value, dim, own in triples:
        if isinstance(value, Tensor):
            value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            missing = leading + own + 1 - value.dim()
            value = value.reshape(size, *[1] * missing, *value.shape[1:])
        moved.append(value)
    return moved
