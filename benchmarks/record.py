"""What a benchmark's result says besides its numbers, and how it is written down; needs neither Ray nor DeepSpeed."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(script: str, arguments: list[str], packages: tuple[str, ...]) -> dict[str, Any]:
    """The command, the commit ("+" where files have changed since), the processor and the versions of a result.

    Args:
        script: path of the benchmark from the root of the repository.
        arguments: of its command line.
        packages: whose versions matter; those that are not installed are left out.
    """
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", script, *arguments]),
        "commit": commit(),
        "cpu": _cpu(),
        "versions": versions,
    }


def commit() -> str:
    """The commit that this code is of, with "+" where files have changed since."""
    return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def write(path: Path, results: dict[str, Any], page: str) -> None:
    """Writes the JSON, and the page beside it under the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    say(f"wrote {path} and {path.with_suffix('.md')}")


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def head(title: str, results: dict[str, Any], name: str) -> str:
    """How a page begins: where its numbers are and what they come from.

    Where results have "runs_made_at", the commits of runs that were kept, "commit" is where the page was drawn.
    """
    drawn, made = f"commit {results['commit']}", results.get("runs_made_at", [results["commit"]])
    code = f"C{drawn[1:]}" if made == [results["commit"]] else f"Runs made at {', '.join(made)}; page drawn at {drawn}"
    machine = f"{results['gpu']}; {results['cpu']}" if results["gpu"] else results["cpu"]
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    return (
        f"# {title}\n\n`{name}` holds the numbers. {code}, {machine}; {versions}. The command:\n\n"
        f"```\n{results['command']}\n```"
    )


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.platform()}, {os.cpu_count()} cores"
