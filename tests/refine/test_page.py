"""docs/refine.md names options and files that exist; tests/cluster/test_refine.py runs its commands."""

import re
import subprocess
import sys
from pathlib import Path

from muser_dist.data.shards import SIDECAR
from muser_dist.refine import job

ROOT = Path(__file__).parents[2]


def test_options_and_files_of_the_page_exist():
    page = (ROOT / "docs" / "refine.md").read_text()
    done = subprocess.run(
        [sys.executable, "jobs/refine_text.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    trained = page[page.index("python jobs/pretrain.py") : page.index("One of the two templates")]
    told = page.replace(trained, "").replace("--data.languages", "")
    options = set(re.findall(r"(?<!\S|`)`?(--[\w.-]+)", told))
    assert {"--max-cost", "--template", "--key-variable"} <= options
    assert [option for option in options if option not in done.stdout] == []
    files = set(re.findall(r"^\| `([\w.-]+)` \|", page, re.M))
    assert files == {job.QUARANTINE, job.REPORT, job.LEDGER, job.MANIFEST} and SIDECAR not in files
