"""All outcomes of a subset law, in the words of the definitions."""

import itertools

import torch

TEMPERATURE = 0.7


def outcomes(law, n, k):
    """Subsets, or orders of k, as places: one a row."""
    paths = itertools.combinations if law == "conditional_poisson" else itertools.permutations
    return torch.tensor(list(paths(range(n), k)))


def log_law(law, scores, index):
    """`log p` of outcomes, in the words of the definition."""
    u = scores / TEMPERATURE
    if law == "conditional_poisson":
        return u[index].sum(-1).log_softmax(0)
    total, left = 0.0, torch.ones(len(index), len(scores), dtype=torch.bool)
    for i in index.T:
        total = total + u[i] - u.expand(len(index), -1).masked_fill(~left, -torch.inf).logsumexp(-1)
        left = left.scatter(1, i[:, None], False)
    return total


def part_of(index, scores, wants):
    if wants == "values":
        return scores[index].sort(-1, descending=True).values
    return torch.zeros(len(index), len(scores), dtype=scores.dtype).scatter(1, index, 1)
