"""Methods: how a gradient reaches W. Imports operators, no task."""

from topkbench.methods._contract import Method, Step
from topkbench.methods.gumbel_rao import GumbelRao
from topkbench.methods.hard import Hard, HardSelection
from topkbench.methods.implicit import AdaptiveIMLE, BlackBox, ImplicitMLE
from topkbench.methods.l2x import L2X
from topkbench.methods.perturbed import Perturbed
from topkbench.methods.relaxed import Relaxed
from topkbench.methods.score_function import ScoreFunction
from topkbench.methods.straight_through import StraightThrough
from topkbench.methods.subset import ReinMaxK, Simple, TaylorControl
from topkbench.methods.systematic import Systematic

__all__ = [
    "L2X",
    "AdaptiveIMLE",
    "BlackBox",
    "GumbelRao",
    "Hard",
    "HardSelection",
    "ImplicitMLE",
    "Method",
    "Perturbed",
    "ReinMaxK",
    "Relaxed",
    "ScoreFunction",
    "Simple",
    "Step",
    "StraightThrough",
    "Systematic",
    "TaylorControl",
]
