"""Methods: how a gradient reaches W. Imports operators, no task."""

from topkbench.methods._contract import Inputs, Method, Step
from topkbench.methods.antithetic_gates import ARMS
from topkbench.methods.bernoulli_gates import REBAR, DisARM
from topkbench.methods.gapped import GappedStraightThrough
from topkbench.methods.gumbel_rao import GumbelRao
from topkbench.methods.hard import Hard, HardSelection
from topkbench.methods.implicit import AdaptiveIMLE, BlackBox, ImplicitMLE
from topkbench.methods.l2x import L2X
from topkbench.methods.oracle import Oracle
from topkbench.methods.perturbed import Perturbed
from topkbench.methods.perturbed_score import PerturbedScore
from topkbench.methods.poisson import PoissonStraightThrough
from topkbench.methods.relax import RELAX
from topkbench.methods.relaxed import Relaxed
from topkbench.methods.score_function import ScoreFunction
from topkbench.methods.soft_gates import HardConcrete, StochasticGates
from topkbench.methods.straight_through import StraightThrough
from topkbench.methods.subset import ReinMaxK, Simple, TaylorControl
from topkbench.methods.subset_differences import SimpleB, SimpleF
from topkbench.methods.swap import Swap
from topkbench.methods.systematic import Systematic
from topkbench.methods.unordered_set import UnorderedSet
from topkbench.methods.without_replacement import ScoreFunctionWithoutReplacement

__all__ = [
    "ARMS",
    "L2X",
    "REBAR",
    "RELAX",
    "AdaptiveIMLE",
    "BlackBox",
    "DisARM",
    "GappedStraightThrough",
    "GumbelRao",
    "Hard",
    "HardConcrete",
    "HardSelection",
    "ImplicitMLE",
    "Inputs",
    "Method",
    "Oracle",
    "Perturbed",
    "PerturbedScore",
    "PoissonStraightThrough",
    "ReinMaxK",
    "Relaxed",
    "ScoreFunction",
    "ScoreFunctionWithoutReplacement",
    "Simple",
    "SimpleB",
    "SimpleF",
    "Step",
    "StochasticGates",
    "StraightThrough",
    "Swap",
    "Systematic",
    "TaylorControl",
    "UnorderedSet",
]
