"""What an installation without some extras can do: packages outside of it are made impossible to import."""

import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_search import write_index

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = canonicalize_name(PROJECT["name"])


def installed(extra: str) -> set[str]:
    """Distributions that `pip install '.[extra]'` brings, with all that they need."""
    todo = [Requirement(f"{OWN}[{extra}]")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        if name == OWN:
            needs = PROJECT["dependencies"] + [need for extra in wanted.extras for need in EXTRAS[extra]]
        else:
            try:
                needs = requires(name) or []
            except PackageNotFoundError:  # of another platform
                needs = []
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                todo.append(need)
    return {name for name, _ in seen}


@cache
def distributions() -> dict[str, set[str]]:
    """The distributions of this environment that hold a module, by its name."""
    return {module: set(map(canonicalize_name, names)) for module, names in packages_distributions().items()}


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_with(extra: str, code: str, *arguments: Path) -> str:
    """What the code prints where nothing but an extra is installed."""
    there = installed(extra)
    missing = {module for module, names in distributions().items() if not names & there}
    assert "webdataset" in missing or "ray" in missing
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing) + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CODE = {
    "search": """
from jobs import search
from muser_dist import Muser
from muser_dist.search import Index
print(Index.open(sys.argv[1]).recommend(["a"], 1)[0].key)
""",
    "symbolic": """
import muser_dist.muser, muser_dist.models.weights
from muser_dist.data.symbolic import abc, encode, midi, musicxml
print("b")
""",
    "data": """
from jobs.make_shards import job
job(["demo", "--out", sys.argv[1] + "/demo", "--train", "2", "--val", "1", "--seconds", "1"])
print("b")
""",
    "report": "from muser_dist.evaluate import charts, report, retrieval, scores_page\nprint('b')",
}


ALL = """
import importlib, pkgutil, muser_dist, jobs
for package in (muser_dist, jobs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name != "muser_dist.data.corpora.demo":
            importlib.import_module(module.name)
"""


@pytest.mark.parametrize("extra", CODE)
def test_an_extra_brings_what_it_is_for(extra, tmp_path):
    write_index(tmp_path, ["a", "b"], np.eye(3, dtype=np.float32)[:2])
    assert run_with(extra, CODE[extra], tmp_path).splitlines()[-1] == "b"


@pytest.mark.slow
def test_training_needs_no_other_extra():
    """All modules, but the one of the extra `data`."""
    run_with("train", ALL)
