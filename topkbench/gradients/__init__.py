"""The gradient laboratory: what a method's gradient is at a given W, beside the true one."""

from topkbench.gradients.line import measure_at
from topkbench.gradients.statistics import Sampling, measure
from topkbench.gradients.truth import Truth, has_truth, true_gradient

__all__ = ["Sampling", "Truth", "has_truth", "measure", "measure_at", "true_gradient"]
