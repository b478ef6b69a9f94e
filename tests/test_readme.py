"""What the README tells a user to do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_block() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return block


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_in_a_fresh_clone(tmp_path):
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    subprocess.run(["make", "demo", f"PYTHON={sys.executable}"], cwd=tmp_path / "clone", check=True)
    run = tmp_path / "clone" / "runs" / "demo"
    scores = json.loads((run / "evaluation.json").read_text())
    instrument = scores["zero_shot"]["instrument"]["audio"]
    assert instrument["accuracy"] >= 3 * instrument["chance"]
    retrieval = scores["retrieval"]["text->audio"]
    assert retrieval["R@10"] >= 5 * retrieval["chance_R@10"]
    for name in ("report.html", "metrics.jsonl", "config.json", "run.json", "model/model.safetensors"):
        assert (run / name).exists(), name
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", python_block()], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert re.match(r"[a-z ]+\[\[", done.stdout), done.stderr


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
