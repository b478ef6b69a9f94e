"""What is wrong with a job's command line is one line that says the mend, before the job does anything."""

import runpy
from pathlib import Path

import pytest

import preflight
from muser_dist.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("words", [["--tower", "audio"], ["--tower", "audio", "--data.classes", "genre"]])
def test_finetuning_begins_with_a_folder_or_a_recipe(words):
    job = runpy.run_path(str(ROOT / "jobs" / "finetune.py"))["job"]
    with pytest.raises(ConfigError, match="argument must be a run's folder or a recipe: python"):
        job(words)


def test_a_report_that_cannot_be_written_is_told_before_a_cluster_is_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "connect", lambda *arguments: pytest.fail("joined"))
    with pytest.raises(ConfigError, match=r"--json: cannot write .*give another file"):
        preflight.job(["--storage", str(tmp_path), "--json", str(tmp_path)])
