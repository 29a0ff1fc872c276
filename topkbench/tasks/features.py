"""`features`: which k of n columns to predict from. One vector of scores serves all rows."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.operators import hard_mask
from topkbench.operators._contract import Part
from topkbench.randomness import Noise, Normals
from topkbench.tasks import _columns
from topkbench.tasks._columns import PLANTED, TRUE
from topkbench.tasks._contract import Batch, Teacher, check_counts
from topkbench.tasks._split import Split, again

START = 0.1  # the standard deviation of a first score
STRENGTH = 0.5  # that of what the kept columns together contribute at first
AT_ONCE = 128  # rows of a held-out batch
HIDDEN = 32  # units of the predictor where the truth is not linear


@dataclass(frozen=True)
class Features:
    """y' = f(m(w) * x): the scores are W itself, `(R, n, 1)`, the same for all rows; f is learned beside it.

    f is linear, `y' = (m * x) beta + bias`, or has `hidden` rectified units in between. The loss is
    `|y' - y|^2 / 2` for quantities and the cross-entropy for classes. m is the same mask in every row, so W
    acts through that one choice alone and the hard gradient is 0 for W (not for f): f adapts to the columns
    that happened to be kept. With but one gap between the k-th score and the next, what waits for rows near
    a tie waits in vain.

    Planted data: x ~ N(0, S), S_ij = rho^|i - j|, the columns that matter at random places.

    - linear: k columns, `y = sum_(i in S) b_i x_i + noise N(0, 1)`, b_i = 1 or -1.
    - xor, orange, additive: two classes, the first with log-odds `x_1 x_2`, `sum_(i<=4) x_i^2 - 4` and
      `-100 sin(x_1 / 5) + |x_2| + x_3 + exp(-x_4) - 2.4` of 2, 4 and 4 columns. xor is interaction only:
      alone, neither column says anything. In additive x_1 decides nearly every label by itself.

    Held-out rows have no noise: y is its mean, and for classes their probabilities. With `rows` there are so
    many training rows in all, else each is new.

    A table (breast_cancer, digits, or a CSV file with its `target` column): each replicate holds out 30 % of
    the rows, of each class, by a split of its own, and standardises by those it trains on. Where n is larger
    than the number of columns p, decoys follow: the columns again, in turn, each with all its rows shuffled.

    Metrics, with the hard top-k: `error`, `sum |y' - y|^2 / sum |y - mean|^2` for quantities, 0 is perfect, 1
    what the mean does; `accuracy` for classes, in [0, 1], on planted data that of the likelier class.
    `support`, in [0, 1]: the columns kept that matter, as a share of as many as could be (on a table with
    decoys those that are no decoys). `exact`: 1 where that is all. `median_rank` of the columns that matter,
    (s + 1) / 2 at best, s their number. What all n columns would do: `baseline`.

    Attributes:
        n: Columns.
        k: How many are kept, in [1, n].
        d: 1.
        data: linear, xor, orange, additive, breast_cancer, digits, or the path of a .csv file.
        target: The column to predict, for a .csv file alone.
        noise: The standard deviation of the noise on training targets of `linear`, >= 0.
        rho: In [0, 1).
        rows: Training rows of planted data, >= 1; None for new ones at every step.
        hidden: Units between, >= 0; None for 0, and HIDDEN for xor, orange and additive.
        split: "evaluation", or "tuning" (for tables): a replicate sets its held-out rows aside, and splits
            its training rows once more in the same way. It never sees its own held-out rows, but as each
            seed has a split of its own, other replicates may.

    Raises:
        ValueError: one of them out of range; more columns than n; a class with fewer than 4 rows to split;
            what `_csv.read` refuses. Later: held-out rows of a replicate that have all the same quantity.

    Cost: a step takes B n operations beside the method's, B n hidden with hidden units. n = 12, k = 3 is
    easy, n = 64, k = 8 the default, n = 200, k = 10 with 200 rows hard. At n = 1,000, k = 10 with 1,000 rows,
    50 steps of `entropic` (batches of 32, 8 replicates) take 0.2 s of processor time, new rows of xor 0.7 s.

    Source: the planted classes, Chen, Song, Wainwright & Jordan 2018, "Learning to Explain", section 4.1, as
    in the published code (n = 10, rho = 0). Differs: one choice for all rows, not one each; random places.
    Of scikit-learn's tables wine and diabetes are left out; as a CSV file either can be read.
    """

    n: int
    k: int
    d: int = 1
    data: str = "linear"
    target: str | None = None
    noise: float = 0.5
    rho: float = 0.5
    rows: int | None = None
    hidden: int | None = None
    split: Split = "evaluation"
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        check_counts(self.n, self.k)
        if self.d != 1:
            raise ValueError(f"d must be 1 (the scores are W itself), got {self.d}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be >= 0 and finite, got {self.noise}")
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho must be in [0, 1), got {self.rho}")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be >= 1, or null for new ones at every step, got {self.rows}")
        if self.hidden is not None and self.hidden < 0:
            raise ValueError(f"hidden must be >= 0, or null for the usual, got {self.hidden}")
        _columns.check(self.data, self.target, self.n, self.split)

    @property
    def classes(self) -> int:
        """How many there are; 0 where a quantity is predicted."""
        if self.data in PLANTED:
            return 0 if self.data == "linear" else 2
        return _columns.table(self.data, self.target).classes

    @property
    def units(self) -> int:
        """How many hidden units f has."""
        if self.hidden is None:
            return HIDDEN if self.data in TRUE else 0
        return self.hidden

    def teacher(self, noise: Noise) -> Teacher:
        """`support`: 1 for columns that matter (for none where that is not known); how data comes about."""
        if self.data not in PLANTED:
            return _columns.split(noise, self.data, self.target, self.n, self.split)
        s = TRUE.get(self.data, self.k)
        columns = noise("support", self.n, law="uniform").argsort(-1)[:, :s]
        signs = noise("signs", s).sign()
        nothing = signs.new_zeros(len(signs), self.n)
        planted = {
            "support": nothing.scatter(1, columns, 1.0),
            "columns": columns,
            "b": nothing.scatter(1, columns, signs),
        }
        if self.rows is None:
            return planted
        x, y = self._planted(planted, noise, self.rows, clean=False)
        return {**planted, "x": x, "y": y}

    def _table(self, like: Tensor) -> tuple[Float[Tensor, "N n"], Float[Tensor, "N m"]]:
        return _columns.numbers(self.data, self.target, self.n, like.dtype, like.device)

    def start(self, noise: Noise) -> Float[Tensor, "R n 1"]:
        """Normal with standard deviation START."""
        return START * noise("W", self.n, 1)

    def others(
        self,
        teacher: Teacher,  # noqa: ARG002
        noise: Noise,
        W: Float[Tensor, "R n 1"],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """`beta` and `bias`, and with hidden units `weight` and `shift` before them."""
        outputs, inputs = max(1, self.classes), self.units or self.n
        scale = STRENGTH / (self.units or self.k) ** 0.5
        last = {"beta": scale * noise("beta", inputs, outputs), "bias": 0 * noise("bias", outputs)}
        if not self.units:
            return last
        first = noise("weight", self.n, self.units) * (2 / self.k) ** 0.5
        return {**last, "weight": first, "shift": 0 * noise("shift", self.units)}

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` rows; from a limited number drawn with replacement, or the first that a table holds out.

        Raises:
            ValueError: held-out rows with the same quantity in all of them.
        """
        if clean:
            return self._varied(self._clean(teacher, noise, rows))
        if "train" in teacher:
            pool = teacher["train"]
            return self._rows(teacher, pool.gather(1, again(noise, rows, pool.shape[1])))
        if "x" in teacher:
            places = again(noise, rows, teacher["x"].shape[1]).unsqueeze(-1)
            x, y = (teacher[name].take_along_dim(places, 1) for name in ("x", "y"))
            return Batch(x, y, teacher)
        return Batch(*self._planted(teacher, noise, rows, clean=False), teacher)

    def _clean(self, teacher: Teacher, noise: Noise, rows: int) -> Batch:
        if "held_out" in teacher:
            return self._rows(teacher, teacher["held_out"][:, :rows])
        return Batch(*self._planted(teacher, noise, rows, clean=True), teacher)

    def _varied(self, test: Batch) -> Batch:
        """Refuse a target that `error` would divide by the spread of, which is 0."""
        if not self.classes and bool((test.target == test.target[:, :1]).all(1).any()):
            raise ValueError(
                f"{self.data}: the target is the same in every held-out row (of {test.target.shape[1]}) of a "
                "replicate, so that error has no meaning: hold out more rows, or predict what varies more"
            )
        return test

    def _rows(self, teacher: Teacher, which: Int[Tensor, "R B"]) -> Batch:
        """Rows of the table, standardised."""
        x, y = (part[which] for part in self._table(teacher["x mean"]))
        x = (x - teacher["x mean"]) / teacher["x spread"]
        if not self.classes:
            y = (y - teacher["y mean"]) / teacher["y spread"]
        return Batch(x, y, teacher)

    def _planted(self, teacher: Teacher, noise: Noise, rows: int, clean: bool) -> tuple[Tensor, Tensor]:
        b = teacher["b"]
        x = noise("x", rows, self.n) @ _columns.correlating(self.n, self.rho, b.dtype, b.device).mT
        if self.data == "linear":
            y = x @ b.unsqueeze(-1)
            return x, y if clean else y + self.noise * noise("target", rows, 1)
        columns = teacher["columns"].unsqueeze(1).expand(-1, rows, -1)
        p = _columns.log_odds(self.data, x.gather(-1, columns)).sigmoid()
        if not clean:
            p = (noise("target", rows, law="uniform") < p).to(p.dtype)
        return x, torch.stack([p, 1 - p], -1)

    def scores(self, W: Float[Tensor, "R n 1"], batch: Batch) -> Float[Tensor, "R B n"]:
        """W, once for every row."""
        return W.mT.expand(-1, batch.x.shape[1], -1)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:  # noqa: ARG002
        """Half the squared error, or the cross-entropy, of what f makes of the masked columns."""
        y = self.predict(part * batch.x, batch)
        if self.classes:
            return -(batch.target * y.log_softmax(-1)).sum(-1)
        return (y - batch.target).square().sum(-1) / 2

    def predict(self, x: Float[Tensor, "*rows n"], batch: Batch) -> Float[Tensor, "*rows outputs"]:
        """What f makes of columns that are masked already."""
        learned = batch.learned
        if self.units:
            x = (x @ learned["weight"] + learned["shift"].unsqueeze(1)).relu()
        return x @ learned["beta"] + learned["bias"].unsqueeze(1)

    def metrics(self, W: Float[Tensor, "R n 1"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`error` or `accuracy`; `support`, `exact` and `median_rank` where it is known what matters."""
        mask = hard_mask(W.squeeze(-1), self.k)
        y = torch.cat([self.predict(mask.unsqueeze(1) * each.x, each) for each in test.pieces(AT_ONCE)], 1)
        columns = {"accuracy" if self.classes else "error": _success(y, test.target, self.classes)}
        matters = test.teacher["support"]
        if (matters > 0).all():  # a table without decoys
            return columns
        most = matters.sum(-1).clamp(max=self.k)
        columns["support"] = (mask * matters).sum(-1) / most
        columns["exact"] = (columns["support"] == 1).to(W.dtype)
        if self.data in PLANTED:
            ranks = W.squeeze(-1).argsort(dim=-1, descending=True, stable=True).argsort(-1).to(W.dtype) + 1
            ranks = ranks.where(matters > 0, torch.nan)
            columns["median_rank"] = ranks.nanquantile(0.5, -1)
        return columns


def baseline(task: Features, seed: int, rows: int = 2000, held_out: int = 1024) -> float:
    """`error` or `accuracy` of the same predictor with all n columns, fitted by scikit-learn.

    Args:
        task: On whose data.
        seed: Of the replicate: the same truth, the same split and the same held-out rows.
        rows: Training rows of planted data where the task has no limit; of a table all are used.
        held_out: Held-out rows, `log.test_rows`.
    """
    normals = Normals([seed], dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    test = task.sample(teacher, normals.child("test"), held_out, clean=True)
    if "train" in teacher:
        train = task._rows(teacher, teacher["train"])
    elif "x" in teacher:
        train = Batch(teacher["x"], teacher["y"], teacher)
    else:
        train = task.sample(teacher, normals.child("train"), rows)
    x, y = train.x[0].numpy(), train.target[0].numpy()
    y = y.argmax(-1) if task.classes else y[:, 0]
    model = _model(task).fit(x, y)
    if task.classes:
        return float((model.predict(test.x[0].numpy()) == test.target[0].argmax(-1).numpy()).mean())
    made = torch.as_tensor(model.predict(test.x[0].numpy()))[None, :, None]
    return float(_success(made, test.target, 0))


def _model(task: Features) -> Any:
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    if not task.units:
        return LogisticRegression(max_iter=2000) if task.classes else LinearRegression()
    kind = MLPClassifier if task.classes else MLPRegressor
    return kind((task.units,), early_stopping=True, max_iter=500, random_state=0)


def _success(y: Float[Tensor, "R B m"], target: Float[Tensor, "R B m"], classes: int) -> Float[Tensor, " R"]:
    """The share of rows whose likeliest class is right, or the share of the variance that is left."""
    if classes:
        return (y.argmax(-1) == target.argmax(-1)).to(y.dtype).mean(-1)
    spread = (target - target.mean(1, keepdim=True)).square().sum((1, 2))
    return (y - target).square().sum((1, 2)) / spread
