"""The source's own example (Stack Overflow 67570529), to the four decimals it prints."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import built

from topkbench.choices import available
from topkbench.config import misfit
from topkbench.tasks import Values

PRINTED_W = torch.zeros(6, 6)
PRINTED_W[0] = torch.tensor([0.4442, 1.7611, 1.8634, 1.5103, 1.5297, 0.1646])
PRINTED_W[2] = torch.tensor([0.4751, 1.8834, 1.9929, 1.6152, 1.6360, 0.1761])
PRINTED_W[4] = torch.tensor([0.4222, 1.6735, 1.7707, 1.4352, 1.4536, 0.1565])
PRINTED_X = torch.tensor([4.3957, 5.2261, 6.1215, 6.4733, 3.5641, 5.6040])
# The source prints W and x to 4 decimals too: half a unit in the last place of its figures, plus rounding.
TO_PRINTED = {"rtol": 0, "atol": 1.001e-4}


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "experiments" / "gradient_through_topk.py"
    spec = importlib.util.spec_from_file_location("gradient_through_topk", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("way", ["by_autograd", "by_selection"])
def test_both_ways_give_what_the_source_prints(example, way):
    W, x = getattr(example, way)()
    torch.testing.assert_close(W, PRINTED_W, **TO_PRINTED)
    torch.testing.assert_close(x, PRINTED_X, **TO_PRINTED)
    assert torch.equal(W[1::2], torch.zeros(3, 6))


def test_the_comparison_holds_every_method_and_the_whole_gradient(example):
    table = example.comparison().set_index("method")
    there = Values(6, 6, 3)
    values = {name for name in available("method") if misfit(built("method", name), there) is None}
    assert set(table.index) == values
    hard = torch.tensor(table.loc["hard", [f"dL/dq{i}" for i in range(6)]].to_numpy(float)).float()
    torch.testing.assert_close(torch.outer(hard, example.X), example.by_autograd()[0], rtol=1e-5, atol=1e-6)
    assert table.loc["hard_selection", "|g - hard| / |hard|"] < 1e-6
    # An estimator that is hard forward may happen to have no more than the hard gradient at one point.
    relaxed = ["softmax", "sparsemax", "entropic", "marginals", "softsort"]
    assert (table["|g - hard| / |hard|"].loc[relaxed] > 0.1).all()
    assert table["|g - hard| / |hard|"].notna().all()


def test_it_prints_both(example, capsys):
    example.main()
    printed = capsys.readouterr().out
    assert "1.7611" in printed
    assert "6.4733" in printed
    assert "ste_sparsemax" in printed
