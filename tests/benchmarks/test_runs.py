"""Runs of a table that are kept say which commit made them, and are not taken for those of another config."""

import importlib
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.small import small_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
JOB = ("muser", 0)
SCRIPT = """
import json, sys
from pathlib import Path
Path(sys.argv[1], "scores.json").write_text(json.dumps({"ran": sys.argv[2:]}))
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks' folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def runs(benchmark, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, at the commit "new"."""
    module = benchmark("runs")
    monkeypatch.setattr(module, "commit", lambda: "new")
    return module


def start(runs: Any, folder: Path, config: Any) -> dict[str, Any]:
    """What is in the folder afterwards."""
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    runs.start(str(script), [str(folder)], {JOB: folder}, {JOB: config}, 1)
    return runs.scores_of(folder)


@pytest.mark.parametrize("name", ["scores.json", "training.json"])
def test_what_another_config_left_is_refused_and_the_same_is_kept(runs, tmp_path, name) -> None:
    folder, config = tmp_path / "run", small_config()
    assert start(runs, folder, config)["ran"] == ["--run", "muser", "0"]
    (folder / "scores.json").unlink()
    (folder / name).write_text(json.dumps(runs.origin(config) | {"kept": True}))
    more = replace(config, train=replace(config.train, lr=0.25, workers=7))
    with pytest.raises(SystemExit, match=r"another config \(train\.lr: \S+ there, 0\.25 here\); delete it to run"):
        start(runs, folder, more)
    operational = replace(config, train=replace(config.train, workers=7))
    again = start(runs, folder, operational)
    assert again == ({"commit": "new", "kept": True} if name == "scores.json" else {"ran": ["--run", "muser", "0"]})


def test_scores_say_the_commit_that_made_them(runs, tmp_path, monkeypatch) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"seed": 0} | runs.origin(small_config())))
    runs.write_scores(tmp_path, {"retrieval": {}})
    first = runs.scores_of(tmp_path)
    assert first == {"seed": 0, "commit": "new", "retrieval": {}}
    monkeypatch.setattr(runs, "commit", lambda: "newer")
    runs.write_scores(tmp_path, {"retrieval": {}})
    assert runs.commits([first, first, runs.scores_of(tmp_path), {}]) == ["new", "new, scored at newer", runs.UNKNOWN]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "numbers. Commit c0ffee, "),
        (["c0ffee"], "numbers. Commit c0ffee, "),
        (["bad"], "numbers. Runs made at bad; page drawn at commit c0ffee, "),
        (["bad", "unknown commit"], "numbers. Runs made at bad, unknown commit; page drawn at commit c0ffee, "),
    ],
)
def test_a_page_names_the_commits_of_its_runs(benchmark, made, said) -> None:
    results = {"gpu": None, "cpu": "a", "versions": {}, "commit": "c0ffee", "command": "b"}
    results |= {"runs_made_at": made} if made else {}
    assert said in benchmark("record").head("Title", results, "a.json")


def test_a_tables_configs_are_the_same_when_they_are_read_again(benchmark, runs, tmp_path) -> None:
    table = benchmark("muser_table")
    options = Namespace(data=tmp_path, work=tmp_path, samples=1024, global_batch=128)
    for recipe in table.SEEDS:
        config = table.config_of(options, recipe, 0)
        (tmp_path / "scores.json").write_text(json.dumps(runs.origin(config)))
        runs._check_kept(tmp_path, config)


@pytest.mark.parametrize("name", ["muser_table", "clamp_table", "htcl_table", "muser_symbolic"])
def test_committed_pages_begin_with_what_their_numbers_say(benchmark, name) -> None:
    results = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    page = (BENCHMARKS / "results" / f"{name}.md").read_text()
    title = page.partition("\n")[0].removeprefix("# ")
    assert page.startswith(benchmark("record").head(title, results, f"{name}.json"))
