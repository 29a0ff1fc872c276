"""What `published_toys.py` compares with: estimators as they were published, their numbers, and captions.

Published numbers are read off figures. `again` is the same setting run before, with other code than this
project's methods: more digits than a figure has, but no publication.
"""

from typing import NamedTuple

from _published_toys import DrawnIdentity, LessMean, OfLogSigmoid, Times

from topkbench import methods, operators
from topkbench.methods import Method, Relaxed, ScoreFunction, Simple, StraightThrough

NOTHING = float("nan")  # not published


def gumbel_st(temperature: float) -> Method:
    """Straight-through Gumbel top-k."""
    return StraightThrough(operators.softmax, temperature, "gumbel")


def gumbel_softmax(temperature: float) -> Method:
    """The relaxed Gumbel top-k."""
    return Relaxed(operators.softmax, temperature, "gumbel")


# Bias, variance and error of k-subset estimators


class Toy(NamedTuple):
    """An estimator, its bias, variance and error; again also size of bias, total variance."""

    method: Method
    again: tuple[float, ...]
    published: tuple[float, ...] = (NOTHING, NOTHING, NOTHING)


SEEDS = [1234, 1067, 9198, 9453, 6240, 7044, 1755, 7898, 3131, 1277]
DRAWS = 10_000
LAMBDA = 2.5
RLOO = ScoreFunction(samples=4, baseline="leave_one_out")
I_MLE = Times(methods.ImplicitMLE(LAMBDA), LAMBDA)
SIMPLE_F = Times(methods.SimpleF(strength=LAMBDA), LAMBDA)
SIMPLE_B = Times(methods.SimpleB(strength=LAMBDA), LAMBDA)
SOFTSUB = OfLogSigmoid(gumbel_softmax(2.0))
SIMPLE = {
    "STE, exact draw": Toy(DrawnIdentity(), (0.190, 0.0076, 0.335, 4.49, 12.8)),
    "I-MLE": Toy(I_MLE, (0.461, 0.0317, 0.580, 2.20, 4.39), (0.46, 0.032, 0.57)),
    "SFE": Toy(ScoreFunction(), (0.0048, 0.130, 0.997, 0.107, 165), (0.003, 0.132, 1.0)),
    "SoftSub": Toy(SOFTSUB, (0.083, 0.0309, 0.271, 0.637, 0.152), (0.08, 0.031, 0.27)),
    "SIMPLE-F": Toy(SIMPLE_F, (0.290, 0.0754, 0.678, 1.10, 9.75), (0.29, 0.076, 0.68)),
    "SIMPLE-B": Toy(SIMPLE_B, (0.373, 0.0064, 0.417, 1.49, 0.643), (0.375, 0.006, 0.41)),
    "SIMPLE": Toy(Simple(), (0.037, 0.0121, 0.246, 0.291, 0.777), (0.035, 0.012, 0.24)),
    "RLOO, 4 draws": Toy(RLOO, (0.0004, 0.037, 0.484, 0.029, 2.75)),
    "SFE, baseline E f": Toy(LessMean(ScoreFunction()), (0.0003, 0.045, 0.708, 0.026, 7.94)),
    "ReinMax-k": Toy(methods.ReinMaxK(), (0.0007, 0.081, 0.791, 0.037, 20.2)),
    "SFE, Taylor control": Toy(methods.TaylorControl(), (0.0006, 0.104, 0.695, 0.036, 16.7)),
}
UNBIASED = ("SFE", "RLOO", "ReinMax", "REINFORCE")
SIMPLE_CAPTION = (
    "Estimators of the gradient of E |z - b|^2, z a random 5-subset of 10, in its log-odds theta: "
    f"{DRAWS:,} estimates of one draw each, means over the ten seeds of the published notebook (Ahmed et "
    "al. 2023). Bias: 1 - cos of the mean estimate and the true gradient g*; variance: that of the cosine "
    "of an estimate and their mean; error: the mean of 1 - cos of an estimate and g*; each published (read "
    "off a figure) / again / here. Size of bias: |mean - g*| / |g*|, with its noise; total "
    "variance over |g*|^2; both again / here. MSE over |g*|^2 and the descent efficiency rho, here. "
    "Reproduced: bias (where it is not 0), variance and error within 5 % of again; for the "
    "unbiased, bias < 0.01 and its square within 5 standard errors of 0. I-MLE, SIMPLE-F and SIMPLE-B with "
    "lambda = 2.5 and, as published, not divided by it; SoftSub on logsigmoid(theta), temperature 2, "
    "compared with the g* of the k-subset law though its draws have the Plackett-Luce law. Again: the same "
    "setting run before with other code, which has more digits than a figure."
)
ONE = {"ST-Gumbel-softmax": (gumbel_st(1.0), 0.060, 0.063), "SIMPLE": (Simple(), 0.025, 0.023)}
ONE_CAPTION = (
    "The same for one of ten (k = 1), seed 1234: bias and variance, read off the published notebook's "
    "figure / here. Reproduced: within 10 %, the error of reading."
)

# Convergence

REPLICATES = 100
LOOKED_AT = (5, 10, 25, 50, 500)
# Method, learning rate, steps; again: the mean gap at the steps of LOOKED_AT.
IMLE: dict[str, tuple[Method, float, int, tuple[float, ...]]] = {
    "exact gradient": (methods.Oracle(), 0.75, 50, (0.89, 0.05, 0.002, 0.001)),
    "SIMPLE": (Simple(), 0.75, 50, (1.05, 0.42, 0.27, 0.25)),
    "I-MLE": (Times(methods.ImplicitMLE(2.0), 2.0), 0.75, 50, (1.32, 0.57, 0.30, 0.235)),
    "STE": (StraightThrough(operators.identity, 1.0, "gumbel"), 0.019, 50, (3.50, 2.35, 0.83, 0.753)),
    "SFE": (ScoreFunction(), 0.0046, 500, (4.08, 4.01, 3.74, 3.20, 0.416)),
}
IMLE_CAPTION = (
    "Minimising E |z - b|^2, z a random 5-subset of 10 (theta and b of NumPy's seed 0), by SGD with "
    f"momentum 0.9 and one draw a step: E f - min f, exact, mean over {REPLICATES} replicates, run "
    "before with other code / here. (Niepert et al. 2021 have a figure: of I-MLE, STE and SFE the first "
    "goes down fastest and lowest.) sd: over replicates at the last step. I-MLE with lambda = 2 and, as "
    "published, not divided by it; STE with Gumbel noise. Reproduced: the last gap within 4 standard errors "
    "of a difference (0.002 where nothing is random). What is claimed: "
)
GRID = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
GRID_CAPTION = (
    "E f - min f after 50 steps of I-MLE on that toy for the published notebook's ranges of lambda (the "
    f"estimate is not divided by it) and learning rate, mean over {REPLICATES} replicates. Nothing to "
    "compare with."
)

# One of eight, a quadratic loss; again: cosine of the mean estimate, size of bias, total variance

MANY = 200_000
CATEGORICAL = {
    "ST (SIMPLE at k = 1)": (Simple(), 0.932, 0.48, 0.27),
    "ReinMax": (methods.ReinMaxK(), 1.000, 0.004, 1.57),
    "REINFORCE": (ScoreFunction(), 1.000, 0.003, 1.10),
    "RLOO, 4 draws": (RLOO, 1.000, NOTHING, 0.161),
    "ST-Gumbel, temperature 1": (gumbel_st(1.0), 0.902, 0.61, 0.44),
    "ST-Gumbel, temperature 0.5": (gumbel_st(0.5), 0.972, 0.36, 1.43),
    "ST-Gumbel, temperature 0.1": (gumbel_st(0.1), 0.9995, 0.08, 10.1),
    "Gumbel-softmax, temperature 1": (gumbel_softmax(1.0), 0.987, 0.49, 0.09),
    "Gumbel-softmax, temperature 0.5": (gumbel_softmax(0.5), 0.992, 0.28, 0.41),
    "Gumbel-softmax, temperature 0.1": (gumbel_softmax(0.1), 0.9997, 0.064, 3.6),
    "GST, gap 1": (methods.GappedStraightThrough(), 0.755, 0.67, 0.48),
}
CATEGORICAL_CAPTION = (
    f"One of eight and a quadratic loss: {MANY:,} estimates of one draw each, other code / here. Cosine of "
    "the mean estimate and the true gradient g*; size of bias: |mean - g*| / |g*|, with its noise; total "
    "variance; descent efficiency rho, here. Reproduced: cosine within 0.01, variance within 5 %, size of "
    "bias within 5 % or 3 standard errors of a difference; of the unbiased, its square within 5 standard "
    "errors of 0. ReinMax at temperatures other than 1 is left out: the published one tempers the backward "
    "pass alone, ours the law of the draw as well. At temperature 0.1 the noise in the size "
    "of bias is 0.018 (ST-Gumbel) and 0.011: 4,000,000 estimates give 0.0625 and 0.0505, standard errors "
    "0.0025 and 0.0020. What is claimed: "
)

# Polynomial programming

STEPS = 8000
BATCH = 64
C = 0.45
# Method and rows: 64 draws for one row are what 64 rows would be, since all rows have the same law.
REINMAX = {
    "exact gradient": (methods.Oracle(), 1),
    "ReinMax": (methods.ReinMaxK(), BATCH),
    "ST (SIMPLE at k = 1)": (Simple(), BATCH),
    "ST-Gumbel": (gumbel_st(1.0), BATCH),
    "Gumbel-softmax": (gumbel_softmax(1.0), BATCH),
    "REINFORCE": (ScoreFunction(samples=BATCH), 1),
    "RLOO": (ScoreFunction(samples=BATCH, baseline="leave_one_out"), 1),
}
POLYNOMIAL = {  # by power, in this order: the expected loss at the end
    1.5: (0.30206, 0.30529, 0.35224, 0.35133, 0.34310, 0.35121, 0.30253),
    2.0: (0.20268, 0.20371, 0.24751, 0.24583, 0.24020, 0.24783, 0.20312),
    3.0: (0.09126, 0.09154, 0.12131, 0.11885, NOTHING, 0.12352, 0.09160),
}
REINMAX_CAPTION = (
    f"Minimising E mean_l |z_l - {C}|^p over 128 binary latents (Liu et al. 2023, polynomial programming): "
    f"Adam, learning rate 0.001, {BATCH} samples a step, temperature 1; the exact mean after {STEPS} steps"
)
REINMAX_RULE = (
    ". again: run before with other code, 2 to 3 seeds, standard deviation up to 0.0002. REINFORCE and "
    "RLOO see the joint loss of all latents, RLOO with the mean of the other samples as its baseline. "
    "Reproduced: ReinMax, RLOO and the exact gradient within 0.004 of the optimum, ST and ST-Gumbel within "
    "0.01 of the start, and all within 0.001 of again."
)
