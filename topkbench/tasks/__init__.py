"""Tasks: what is learned. Imports no method, and of the operators only the hard top-k."""

from topkbench.tasks._contract import (
    Batch,
    KnownExpectation,
    KnownInputs,
    Learns,
    Task,
    Teacher,
    scores_of,
)
from topkbench.tasks.attention import Attention
from topkbench.tasks.autoencoder import Autoencoder
from topkbench.tasks.classification import Classification
from topkbench.tasks.features import Features
from topkbench.tasks.gate import Gate
from topkbench.tasks.knn import KNN
from topkbench.tasks.mask import Mask
from topkbench.tasks.polynomial import Polynomial
from topkbench.tasks.retrieval import Retrieval
from topkbench.tasks.router import Router
from topkbench.tasks.subset_toy import SubsetToy
from topkbench.tasks.subset_vae import SubsetVAE
from topkbench.tasks.values import Values

__all__ = [
    "KNN",
    "Attention",
    "Autoencoder",
    "Batch",
    "Classification",
    "Features",
    "Gate",
    "KnownExpectation",
    "KnownInputs",
    "Learns",
    "Mask",
    "Polynomial",
    "Retrieval",
    "Router",
    "SubsetToy",
    "SubsetVAE",
    "Task",
    "Teacher",
    "Values",
    "scores_of",
]
