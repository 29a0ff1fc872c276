"""The table of methods, from the listing of conf/method and what each method and operator declares.

python -m topkbench.catalogue            for a terminal
python -m topkbench.catalogue FOLDER     methods.csv, methods.md and methods.tex as well
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from topkbench import tables
from topkbench.choices import available
from topkbench.config import built
from topkbench.methods._contract import answers_for, needs_objective
from topkbench.operators import About, Guarantees, Operator
from topkbench.operators._contract import bound

SIGNS = {
    "sums_to_k": "k",
    "bounded": "01",
    "monotone": "<",
    "shift_invariant": "+c",
    "hard_limit": "H",
    "uniform_limit": "U",
    "sparse": "0",
    "rows_sum_to_1": "P",
    "infinite": "inf",
    "equivariant": "perm",
    "ties": "=",
    "gradient": "d",
    "twice": "dd",
}
NOTE = """promises of the relaxation, each checked by the tests: k: the mask sums to k; 01: it lies in [0, 1];
<: a larger score never gets a smaller entry; +c: a shift of all scores changes nothing; H: the hard
mask as the temperature goes to 0; U: k/n as it goes to infinity; 0: exact zeros; P: the rows of the
selection sum to 1; inf: infinite scores; perm: permutations commute with it; =: equal scores get
equal entries; d: the gradient is the derivative; dd: so is the second. random: draws noise. needs:
the loss as a number, not its derivative alone. parts: what the loss may be a function of. cost: for
one row of n scores."""


def row(name: str) -> dict[str, Any]:
    """What the table says of a method of conf/method."""
    method = built("method", name)
    operator = bound(method.operator)[0] if hasattr(method, "operator") else None
    own: About = getattr(method, "about", None) or About()
    about = operator.about if operator is not None else own
    return {
        "method": name,
        "estimator": type(method).__name__,
        "family": own.family or about.family,
        "operator": getattr(operator, "__name__", "") if operator is not None else "",
        "promises": promises(operator),
        "random": "yes" if method.stochastic else "",
        "needs": "objective" if needs_objective(method) else "",
        "parts": " ".join(answers_for(method)),
        "cost": own.cost or about.cost,
        "source": "; ".join(dict.fromkeys(part.source for part in (own, about) if part.source)),
        "checked against": "; ".join(dict.fromkeys(part.checked for part in (own, about) if part.checked)),
    }


def promises(operator: Operator | None) -> str:
    """The signs of what an operator guarantees."""
    if operator is None:
        return ""
    declared = [field.name for field in fields(Guarantees) if getattr(operator.guarantees, field.name)]
    return " ".join(sign for name, sign in SIGNS.items() if name in declared)


def catalogue() -> pd.DataFrame:
    """One row for each file of conf/method, by family."""
    rows = pd.DataFrame([row(name) for name in available("method")])
    return rows.sort_values(["family", "method"], ignore_index=True)


def text(table: pd.DataFrame) -> str:
    """For a terminal: a family at a time, its methods a line each, and what they have in common once."""
    lines = []
    for family, methods in table.groupby("family"):
        lines.append(f"\n{family}")
        for _, own in methods.iterrows():
            through = f"{own['estimator']}({own['operator']})" if own["operator"] else own["estimator"]
            noise = " random" * bool(own["random"]) + " needs the objective" * bool(own["needs"])
            lines.append(f"  {own['method']:<22} {through:<35} {own['promises']}{noise}".rstrip())
            lines.append(f"  {'':<22} {own['parts']}; {own['cost']}; {own['source']}")
            if own["checked against"]:
                lines.append(f"  {'':<22} checked: {own['checked against']}")
    return "\n".join(lines)


def main() -> None:
    """Print the table; save it where a folder is given."""
    table = catalogue()
    print(text(table))
    print(f"\n{len(table)} methods. {NOTE}")
    if len(sys.argv) > 1:
        paths = tables.write_plain(table, Path(sys.argv[1]), "methods", " ".join(NOTE.split()))
        print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
