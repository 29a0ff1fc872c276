"""The distribution functions of the threshold family (`_threshold.Kernel`)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
MARGIN = 1.01  # a little wider than a proof asks, so that rounding cannot push a root at an end outside


class _Symmetric:
    """F(-u) = 1 - F(u). The scores' gap widens the bracket unless F' is log-concave.

    If it is, `t <= Q((n-k) / (n-k+1))` whatever the gap: at t = e >= 0 the k-th score is short of 1 by
    F(e - h), the n-k below are over 0 by at most (n-k) F(-e - h), and log-concavity makes the ratio of
    the two at least its value at h = 0. The lower end likewise.
    """

    steps: ClassVar[int] = 14
    smooth: ClassVar[bool] = True
    straight: ClassVar[bool] = False
    log_concave: ClassVar[bool] = True

    def quantile(self, p: Tensor) -> Tensor:
        raise NotImplementedError

    def bracket(self, k: Tensor, n: int, half: Tensor) -> tuple[Tensor, Tensor]:
        low, high = -MARGIN * self.quantile(k / (k + 1)), MARGIN * self.quantile((n - k) / (n - k + 1))
        return (low, high) if self.log_concave else (low - half, high + half)

    def start(self, low: Tensor, high: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(low)

    def curve(self, p: Tensor) -> Tensor:
        return p.logit()

    def rate(self, p: Tensor) -> Tensor:
        return torch.addcmul(p, p, p, value=-1)


class Logistic(_Symmetric):
    """1 / (1 + e^-u)."""

    def cdf_(self, v: Tensor) -> Tensor:
        return v.sigmoid_()

    def density(self, mask: Tensor) -> Tensor:
        return torch.addcmul(mask, mask, mask, value=-1)

    def moments_(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = v.sigmoid_()
        total = mask.sum(-1, keepdim=True)
        return total, total - torch.linalg.vector_norm(mask, dim=-1, keepdim=True).square_()

    def quantile(self, p: Tensor) -> Tensor:
        return p.logit()


class Laplace(_Symmetric):
    """e^u / 2 below 0, 1 - e^-u / 2 above."""

    def cdf_(self, v: Tensor) -> Tensor:
        above = v.ge(0).to(v.dtype)
        return self._decay(v).mul_(0.5).sub_(above).abs_()

    def density(self, mask: Tensor) -> Tensor:
        return torch.minimum(mask, 1 - mask)

    def moments_(self, v: Tensor) -> tuple[Tensor, Tensor]:
        # F = (1 + s - s e) / 2 with s the sign of v, whose sum is exact, and e = e^-|v|.
        sign, e = v.sign(), self._decay(v)
        signs, slope = sign.sum(-1, keepdim=True), e.sum(-1, keepdim=True)
        return (signs + v.shape[-1] - sign.mul_(e).sum(-1, keepdim=True)) / 2, slope / 2

    def _decay(self, v: Tensor) -> Tensor:
        # exp2 is several times as fast as exp on a CPU.
        return v.abs_().mul_(-LOG2E).exp2_()

    def quantile(self, p: Tensor) -> Tensor:
        return torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log())


class Gaussian(_Symmetric):
    """The normal distribution function."""

    def cdf_(self, v: Tensor) -> Tensor:
        return v.mul_(-math.sqrt(0.5)).erfc_().mul_(0.5)

    def density(self, mask: Tensor) -> Tensor:
        # Where the mask is 0 or 1 the density is 0, with a quantile and derivatives that are finite.
        inside = torch.addcmul(mask, mask, mask, value=-1).ceil()
        limits = torch.finfo(mask.dtype)
        u = torch.special.ndtri(mask.clamp(limits.tiny, 1 - limits.eps / 2))
        return inside * torch.exp2(u * u * (-LOG2E / 2)) / math.sqrt(2 * math.pi)

    def moments_(self, v: Tensor) -> tuple[Tensor, Tensor]:
        bell = v.square().mul_(-LOG2E / 2).exp2_().sum(-1, keepdim=True)
        return self.cdf_(v).sum(-1, keepdim=True), bell / math.sqrt(2 * math.pi)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.special.ndtri(p)


class Cauchy(_Symmetric):
    """atan(u) / pi + 1/2: heavy tails, not log-concave."""

    steps: ClassVar[int] = 28
    log_concave: ClassVar[bool] = False

    def cdf_(self, v: Tensor) -> Tensor:
        return v.atan_().mul_(1 / math.pi).add_(0.5)

    def density(self, mask: Tensor) -> Tensor:
        return (mask * math.pi).sin().square() / math.pi

    def moments_(self, v: Tensor) -> tuple[Tensor, Tensor]:
        slope = v.square().add_(1).reciprocal_().sum(-1, keepdim=True) / math.pi
        return self.cdf_(v).sum(-1, keepdim=True), slope

    def quantile(self, p: Tensor) -> Tensor:
        return ((p - 0.5) * math.pi).tan()

    def curve(self, p: Tensor) -> Tensor:
        return self.quantile(p)

    def rate(self, p: Tensor) -> Tensor:
        return self.density(p)


@dataclass(frozen=True)
class Power:
    """clip(u, 0, 1)^r, r > 0. Between u_(k) - 1, where k scores are at 1, and u_(k+1), where n-k are at 0."""

    r: float
    steps: ClassVar[int] = 18
    smooth: ClassVar[bool] = False

    @property
    def straight(self) -> bool:
        return self.r == 1

    def cdf_(self, v: Tensor) -> Tensor:
        return self._raised(v.clamp_(0, 1))

    def density(self, mask: Tensor) -> Tensor:
        # 1 where the mask is inside (0, 1), else 0.
        inside = torch.addcmul(mask, mask, mask, value=-1).ceil()
        if self.r == 1:
            return inside
        positive = mask.clamp_min(torch.finfo(mask.dtype).tiny)  # the root of 0 has no second derivative
        if self.r == 2:
            return 2 * positive.sqrt() * inside
        return self.r * positive.pow(1 - 1 / self.r) * inside

    def moments_(self, v: Tensor) -> tuple[Tensor, Tensor]:
        w = v.clamp_(0, 1)
        if self.r == 1:
            total = w.sum(-1, keepdim=True)
            return total, w.addcmul_(w, w, value=-1).ceil_().sum(-1, keepdim=True)
        power = w if self.r == 2 else w.pow(self.r - 1)
        slope = self.r * (power.sum(-1, keepdim=True) - w.floor().sum(-1, keepdim=True))
        return self._raised(w).sum(-1, keepdim=True), slope

    def curve(self, p: Tensor) -> Tensor:
        return p.pow(1 / self.r)

    def rate(self, p: Tensor) -> Tensor:
        return self.density(p)

    def bracket(self, k: Tensor, n: int, half: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        middle = half - 1, -half
        return torch.minimum(*middle), torch.maximum(*middle)

    def start(self, low: Tensor, high: Tensor) -> Tensor:
        return (low + high) / 2

    def _raised(self, w: Tensor) -> Tensor:
        return w if self.r == 1 else w.square_() if self.r == 2 else w.pow_(self.r)


class Exponential:
    """min(1, e^u). Above u_(k), where k scores are at 1, by at most log(n - k + 1)."""

    steps: ClassVar[int] = 22
    smooth: ClassVar[bool] = False
    straight: ClassVar[bool] = False

    def cdf_(self, v: Tensor) -> Tensor:
        return v.clamp_(max=0).mul_(LOG2E).exp2_()

    def density(self, mask: Tensor) -> Tensor:
        return torch.where(mask < 1, mask, 0)

    def moments_(self, v: Tensor) -> tuple[Tensor, Tensor]:
        # The slope is that towards higher t, where a score at the kink has left 1: the start is such a point.
        ones = v.clone().gt_(0).sum(-1, keepdim=True)
        total = self.cdf_(v).sum(-1, keepdim=True)
        return total, total - ones

    def curve(self, p: Tensor) -> Tensor:
        return p.log()

    def rate(self, p: Tensor) -> Tensor:
        return p

    def bracket(self, k: Tensor, n: int, half: Tensor) -> tuple[Tensor, Tensor]:
        return half, half + MARGIN * (n - k + 1).log()

    def start(self, low: Tensor, high: Tensor) -> Tensor:  # noqa: ARG002
        return low
