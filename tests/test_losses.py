"""The smooth top-k hinge loss against enumeration, its limits and finite differences."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from topkbench.losses import smooth_topk_svm


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_enumeration(scores, label, k, tau):
    """Over all k-subsets: those without the label carry a margin of 1."""
    everything, with_label = [], []
    for subset in combinations(range(len(scores)), k):
        energy = scores[list(subset)].sum() / (k * tau)
        everything.append(energy + (label not in subset) / tau)
        if label in subset:
            with_label.append(energy)
    return tau * (logsumexp(everything) - logsumexp(with_label))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("tau", [0.05, 1.0, 5.0])
def test_enumeration(k, tau):
    scores, labels = 2 * draw(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = smooth_topk_svm(scores, labels, k, tau)
    expected = [
        by_enumeration(row, y, k, tau) for row, y in zip(scores.numpy(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(np.array(expected)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_derivatives(k):
    scores, labels = draw(3, 5).requires_grad_(), torch.tensor([0, 3, 2])
    tau = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: smooth_topk_svm(s, labels, k, t), (scores, tau))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_low_temperature_is_the_hard_hinge(k):
    scores, labels = 3 * draw(20, 6), torch.arange(20) % 6
    own = scores.gather(-1, labels[:, None])[:, 0]
    others = scores.scatter(-1, labels[:, None], -torch.inf).topk(k).values[:, -1]
    expected = (1 + (others - own) / k).clamp(min=0)
    torch.testing.assert_close(smooth_topk_svm(scores, labels, k, 1e-3), expected, rtol=0, atol=0.01)


def test_k_1_is_the_cross_entropy_with_a_margin():
    scores, labels = draw(4, 5), torch.tensor([0, 1, 2, 3])
    margin = scores + 1 - torch.nn.functional.one_hot(labels, 5)
    expected = torch.nn.functional.cross_entropy(margin, labels, reduction="none")
    torch.testing.assert_close(smooth_topk_svm(scores, labels, 1), expected, rtol=1e-9, atol=1e-9)


def test_many_classes_in_single_precision():
    scores = draw(2, 1000).float().requires_grad_()
    loss = smooth_topk_svm(scores, torch.tensor([3, 999]), 5, 0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad.isfinite().all()


def test_bad_k():
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\] for 5 scores, got 6"):
        smooth_topk_svm(draw(2, 5), torch.tensor([0, 1]), 6)
