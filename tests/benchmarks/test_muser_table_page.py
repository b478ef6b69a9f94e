"""The page of the table of MUSER's recipes, of results that are short."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("points", "cells"), [(16, "0 1 3 7 15"), (4, "- - 0 1 3"), (1, "- - - - 0")])
def test_a_loss_stands_where_it_was_measured(monkeypatch, points, cells):
    monkeypatch.syspath_prepend(BENCHMARKS)
    page = importlib.import_module("muser_table_page")
    text = page._curves({"muser": [{"curve": [{"loss": float(i)} for i in range(points)]}]})
    row = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert row == ["muser", *("" if cell == "-" else f"{cell}.000" for cell in cells.split())]
