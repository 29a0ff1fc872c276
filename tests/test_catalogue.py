from conftest import METHODS

from topkbench import catalogue


def test_every_method_says_what_it_is():
    table = catalogue.catalogue().set_index("method")
    assert set(table.index) == set(METHODS)
    for column in ("estimator", "family", "parts", "cost", "source", "checked against"):
        silent = table.index[table[column] == ""].tolist()
        assert not silent, f"no {column}: {silent}"
    assert table.loc["entropic", "promises"].split()[:3] == ["k", "01", "<"]
    assert table.loc["softsort", "random"] == ""
    assert table.loc["gumbel_softsort", "random"] == "yes"
    assert table.loc["reinmax_k", "parts"] == "mask"


def test_it_is_printed_and_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["catalogue", str(tmp_path / "methods")])
    catalogue.main()
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in METHODS)
    assert max(map(len, printed.splitlines())) < 200
    assert {path.name for path in (tmp_path / "methods").iterdir()} == {
        "methods.csv",
        "methods.md",
        "methods.tex",
    }
    assert (tmp_path / "methods" / "methods.md").read_text().count("\n| ") == len(METHODS) + 1
