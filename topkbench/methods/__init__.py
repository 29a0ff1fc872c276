"""Methods: how a gradient reaches W. Imports operators, no task."""

from topkbench.methods._contract import Method, Step
from topkbench.methods.hard import Hard, HardSelection
from topkbench.methods.relaxed import Relaxed
from topkbench.methods.straight_through import StraightThrough

__all__ = ["Hard", "HardSelection", "Method", "Relaxed", "Step", "StraightThrough"]
