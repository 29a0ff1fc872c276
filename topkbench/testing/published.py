"""Published relaxations of top-k as their papers write them: one row, double precision, no operator of ours.

Many of them are one operator under several names; `experiments/equivalences.py` measures which. Clarity goes
over speed. Each function takes `(scores (n,), k, temperature)`, 1 <= k < n, and gives the mask `(n,)` in
this project's temperature T; what the paper calls its strength is translated in the docstring. The
gradient is autograd's through the paper's formulas or, where one is stated, its vector-Jacobian product.
"""

import math

import torch
from torch import Tensor

from topkbench.testing._solvers import Stated, affine, bisected, pooled, settled, symmetric

# A logistic threshold


def lml(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Limited multi-label projection: argmin over sum y = k of `-<x, y> - H(y) - H(1 - y)`, x = s / T.

    y = sigmoid(x + nu), the dual variable nu by bracketing; the VJP from the differentiated KKT conditions.

    Source: Amos, Koltun & Kolter 2019, "The Limited Multi-Label Projection Layer", and its published code.
    """
    x = scores.detach() / temperature
    ranked = x.sort(descending=True).values
    minus_nu = bisected(lambda t: (x - t).sigmoid().sum() - k, ranked[k] - 7, ranked[k - 1] + 7)
    y = (x - minus_nu).sigmoid()

    def vjp(g: Tensor) -> Tensor:
        h = 1 / (1 / y + 1 / (1 - y))
        return -h * (-g + (h @ g) / h.sum()) / temperature

    return Stated.apply(scores, y, vjp)


def soft(scores: Tensor, k: int, temperature: float) -> Tensor:
    """SOFT: n times the entropic transport plan from the scores to the anchor "taken", Sinkhorn converged.

    Costs `C_ij = (s_i - b_j)^2 / max`, anchors b = (1, 0), masses (k/n, (n-k)/n); epsilon = 2 T / max. The
    VJP is the paper's, by the Schur complement of the anchors' block, with the largest square held constant.

    Source: Xie et al. 2020, "Differentiable Top-k with Optimal Transport". Differs: there the k smallest.
    """
    s, n, anchors = scores.detach(), len(scores), torch.tensor([1.0, 0.0], dtype=scores.dtype)
    mu, nu = 1 / n, torch.tensor([k / n, (n - k) / n], dtype=scores.dtype)
    squares = (s.unsqueeze(1) - anchors).square()
    cost, epsilon = squares / squares.max(), 2 * temperature / squares.max()

    def rows(g: Tensor) -> Tensor:
        return epsilon * (math.log(mu) - ((g - cost) / epsilon).logsumexp(1)).unsqueeze(1)

    def columns(f: Tensor) -> Tensor:
        return epsilon * (nu.log() - ((f - cost) / epsilon).logsumexp(0))

    g = settled(lambda g: columns(rows(g)), torch.zeros_like(nu))
    plan = ((rows(g) + g - cost) / epsilon).exp()

    def vjp(grad: Tensor) -> Tensor:
        first = plan[:, :1]
        inverse = (nu[:1].diag() - first.T @ first / mu).inverse()
        along = first / mu @ inverse
        g_plan = torch.stack([n * grad, torch.zeros_like(grad)], 1) * plan
        g_rows, g_first = g_plan.sum(1), g_plan.sum(0)[:1]
        of_rows = g_rows / mu + first / mu @ (along.T @ g_rows) - along @ g_first
        of_columns = torch.cat([inverse @ g_first - along.T @ g_rows, torch.zeros(1, dtype=s.dtype)])
        g_cost = (-g_plan + (of_rows.unsqueeze(1) + of_columns) * plan) / epsilon
        return (g_cost * 2 * (s.unsqueeze(1) - anchors) / squares.max()).sum(1)

    return Stated.apply(scores, n * plan[:, 0], vjp)


def spartan(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Spartan's soft top-k with unit costs and budget k: its own Sinkhorn updates, run on; beta = 1 / T.

    Source: Tai, Tian & Lim 2022, "Spartan: Differentiable Sparsity via Regularized Transportation", and its
    code, with the VJP by implicit differentiation. Differs: run to the fixed point, there to 1 %.
    """
    beta = 1 / temperature
    z = beta * scores.detach()

    def step(mu: Tensor) -> Tensor:
        return math.log(k) - (z - torch.nn.functional.softplus(z + mu)).logsumexp(0)

    y = (z + settled(step, -z.mean())).sigmoid()

    def vjp(g: Tensor) -> Tensor:
        return beta * y * (1 - y) * (g - (g * y * (1 - y)).sum() / (k - (y * y).sum()))

    return Stated.apply(scores, y, vjp)


# A Euclidean projection


def capped_simplex(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Projection of s / T onto `0 <= x <= 1, sum x = k`: sort, then try how many are 0 and how many are 1.

    Source: Wang & Lu 2015, "Projection onto the Capped Simplex", and its published code.
    """
    y, order = (scores / temperature).sort()
    n = len(y)
    total = torch.cat([torch.zeros(1, dtype=y.dtype), y.cumsum(0)])
    far = torch.full((1,), torch.inf, dtype=y.dtype)
    edge = torch.cat([-far, y, far]).detach()
    x = torch.cat([0 * y[: n - k], 0 * y[n - k :] + 1])  # the k-th and (k+1)-th are 1 apart, or more
    for a in range(n):
        for b in range(a + 1, n + 1):
            gamma = (k + b - n + total[a] - total[b]) / (b - a)
            if edge[a] + gamma <= 0 < edge[a + 1] + gamma and edge[b] + gamma < 1 <= edge[b + 1] + gamma:
                x = torch.cat([torch.zeros_like(y[:a]), y[a:b] + gamma, torch.ones_like(y[b:])])
    return torch.zeros_like(y).scatter(0, order, x)


def budget_bisect(scores: Tensor, k: int, temperature: float) -> Tensor:
    """`argmax <x, p> - |p|^2 / 2` over `0 <= p <= 1, sum p = k`, x = s / T, by bisection.

    Source: `budget_bisect` of the package entmax, 1.3, with its VJP.
    """
    x = scores.detach() / temperature
    share = k / len(x)
    tau = bisected(lambda t: (x - t).clamp(0, 1).sum() - k, x.min() - share, x.max() - share)
    p = (x - tau).clamp(0, 1)

    def vjp(g: Tensor) -> Tensor:
        support = ((p > 0) & (p < 1)).to(p.dtype)
        return support * (g - (support @ g) / support.sum().clamp(min=1)) / temperature

    return Stated.apply(scores, p, vjp)


def sparsemap(scores: Tensor, k: int, temperature: float) -> Tensor:
    """SparseMAP of the k-hot vectors: `argmin |M p - x|^2` over distributions p on them, x = s / T.

    The active set grows by the k-hot vector that the oracle, top-k of the residual x - M p, names (Wolfe's
    minimum-norm point). The gradient is autograd's through the last linear system.

    Source: Niculae, Martins, Blondel & Cardie 2018, "SparseMAP", with a budget as its structure.
    """
    x = scores / temperature
    residual, active, p = x.detach(), torch.zeros(len(x), 0, dtype=x.dtype), x.new_zeros(0)
    while True:
        best = torch.zeros_like(x).scatter(0, residual.topk(k).indices, 1.0)
        if active.shape[1] and residual @ best <= residual @ (active @ p) + 1e-12:
            return active @ affine(active, x)
        active, p = torch.cat([active, best.unsqueeze(1)], 1), torch.cat([p, p.new_zeros(1)])
        while (goal := affine(active, x.detach())).min() < 0:
            falling = goal < 0
            p = p + (p[falling] / (p - goal)[falling]).min() * (goal - p)
            active, p = active[:, p > 1e-12], p[p > 1e-12]
        p, residual = goal, x.detach() - active @ goal


def sander(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Sparse top-k mask with the 2-norm: `y = (s - v) / lambda`, lambda = T, on the sorted scores.

    v is the non-increasing argmin of `|s - v|^2 / (2 lambda) + <w, v>`, w = (1, .., 1, 0, .., 0), by PAV.

    Source: Sander, Puigcerver, Djolonga, Peyré & Blondel 2023, "Fast, Differentiable and Sparse Top-k".
    """
    s, order = scores.sort(descending=True)
    w = (torch.arange(len(s)) < k).to(s.dtype)
    v = pooled(len(s), lambda block: s[block].mean() - temperature * w[block].mean())
    return torch.zeros_like(s).scatter(0, order, (s - v) / temperature)


def permutahedron(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Projection of z = s / T onto the permutahedron of w = (1, .., 1, 0, .., 0): `z - v`, unsorted.

    v is the isotonic regression of sort(z) - w; epsilon = T.

    Source: Blondel, Teboul, Berthet & Djolonga 2020, "Fast Differentiable Sorting and Ranking".
    """
    z, order = (scores / temperature).sort(descending=True)
    w = (torch.arange(len(z)) < k).to(z.dtype)
    return torch.zeros_like(z).scatter(0, order, z - pooled(len(z), lambda block: (z - w)[block].mean()))


# A Laplace threshold


def lapsum(scores: Tensor, k: int, temperature: float) -> Tensor:
    """LapSum in closed form: with r = -s sorted, find b with `sum_i Lap((b - r_i) / alpha) = k`, alpha = T.

    Between two neighbours that is a quadratic equation in e^b. `VJP: h (g - <q, g>)` with
    `h = min(y, 1-y) / alpha`, `q = softmax(-|b - r| / alpha)`.

    Source: Struski, Bednarczyk, Podolak & Tabor 2025, "LapSum - One Method to Differentiate Them All".
    """
    r = (-scores.detach() / temperature).sort().values
    cdf = torch.distributions.Laplace(0.0, 1.0).cdf
    left = int((cdf(r.unsqueeze(1) - r).sum(1) < k).sum())  # how many of the r lie below b
    rising, falling = (r[left : 1 + left] - r[left:]).exp().sum(), (r[:left] - r[left - 1 : left]).exp().sum()
    if left == 0:
        b = r[0] + (2 * k / rising).log()
    elif left == len(r):
        b = r[-1] - (2 * (left - k) / falling).log()
    else:
        # rising e^(b - r_right) / 2 - falling e^(r_left - b) / 2 = k - left
        gap, d = (r[left - 1] - r[left]).exp(), k - left
        root = (d * d + rising * falling * gap).sqrt()
        b = r[left] + ((d + root) / rising if d > 0 else falling * gap / (root - d)).log()
    away = scores.detach() / temperature + b
    y = cdf(away)

    def vjp(g: Tensor) -> Tensor:
        return torch.minimum(y, 1 - y) / temperature * (g - (-away.abs()).softmax(0) @ g)

    return Stated.apply(scores, y, vjp)


# A constrained softmax


def constrained_softmax(scores: Tensor, k: int, temperature: float) -> Tensor:
    """`argmin KL(y || softmax(s / T))` with y <= 1, sum y = k: what exceeds 1 is cut and the rest rescaled.

    Source: Martins & Kreutzer 2017, "Learning What's Easy", and its code; bounds u = 1 / k, times k.
    """
    x, free = scores / temperature, torch.ones(len(scores), dtype=torch.bool)
    while True:
        y = x.masked_fill(~free, -torch.inf).softmax(0) * (k - (~free).sum())
        if not (y > 1).any():
            return torch.where(free, y, 1.0)
        free = free & (y <= 1)


def coordinate_descent(scores: Tensor, k: int, temperature: float) -> Tensor:
    """CoLT5's and CoDA's router: dual coordinate descent, unrolled to its fixed point; epsilon = T.

    Source: Ainslie et al. 2023, "CoLT5", and Lei et al. 2023, "Conditional Adapters", there 20 to 50 steps.
    """

    def a(b: Tensor) -> Tensor:
        return temperature * (math.log(k) - ((scores + b) / temperature).logsumexp(0))

    b = settled(lambda b: -(scores + a(b)).relu(), -scores)
    return ((scores + a(b) + b) / temperature).exp()


# The marginals of random k-subsets


def dp_shannon(scores: Tensor, k: int, temperature: float) -> Tensor:
    """The gradient of a dynamic program, `V_i(j) = max_T(V_{i-1}(j), V_{i-1}(j-1) + s_i)`: dV_n(k)/ds.

    `max_T(a, b) = T log(e^(a/T) + e^(b/T))`, the maximum with Shannon's entropy. Twice autograd.

    Source: Vivier-Ardisson, Sander, Parmentier & Blondel 2026, "Differentiable Knapsack and Top-k Operators
    via Dynamic Programming".
    """
    leaf = scores if scores.requires_grad else scores.clone().requires_grad_()
    best = [leaf.new_zeros(())]
    for s in leaf / temperature:
        grown = [value + s for value in best]
        best = [best[0], *(torch.logaddexp(a, b) for a, b in zip(best[1:], grown, strict=False)), grown[-1]]
        best = best[: k + 1]
    return torch.autograd.grad(temperature * best[k], leaf, create_graph=True)[0]


def sst(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Stochastic softmax trick without its noise: the mean of `p(z) ~ exp(<z, s> / T)`, by messages.

    From the left and from the right over the scores; the VJP as a central difference.

    Source: Paulus, Choi, Tarlow, Krause & Maddison 2020, "Gradient Estimation with Stochastic Softmax
    Tricks", and its code. Differs: steps of 1e-4, there of 1e-2.
    """
    n, never = len(scores), torch.finfo(scores.dtype).min

    def passed(x: Tensor) -> Tensor:
        f = torch.full((n + 1, k + 1), never, dtype=x.dtype)  # log-weight of j among the first i
        f[0, 0] = 0
        for i in range(n):
            f[i + 1] = torch.logaddexp(f[i], torch.cat([f.new_full((1,), never), f[i, :-1] + x[i]]))
        return f

    def mean(x: Tensor) -> Tensor:
        ahead, behind = passed(x)[:-1], passed(x.flip(0)).flip(0)[1:].flip(1)
        without, within = (ahead + behind).logsumexp(1), (ahead[:, :-1] + behind[:, 1:]).logsumexp(1) + x
        return (within - torch.logaddexp(without, within)).exp()

    x, eps = scores.detach() / temperature, 1e-4
    return Stated.apply(
        scores, mean(x), lambda g: (mean(x + eps * g) - mean(x - eps * g)) / (2 * eps * temperature)
    )


def conditional_poisson(scores: Tensor, k: int, temperature: float) -> Tensor:
    """`w_i e_(k-1)(w without i) / e_k(w)`, w = exp(s / T): how likely a maximum-entropy sample holds i.

    Source: Chen, Dempster & Liu 1994, "Weighted finite population sampling to maximize entropy".
    """
    w = ((scores - scores.detach().max()) / temperature).exp()
    others = [torch.cat([w[:i], w[i + 1 :]]) for i in range(len(w))]
    return w * torch.stack([symmetric(rest)[k - 1] for rest in others]) / symmetric(w)[k]
