"""What is wrong with a job's command line is one line that says the mend, before the job does anything."""

import runpy
from pathlib import Path

import pytest

from muser_dist.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("words", [["--tower", "audio"], ["--tower", "audio", "--data.classes", "genre"]])
def test_finetuning_begins_with_a_folder_or_a_recipe(words):
    job = runpy.run_path(str(ROOT / "jobs" / "finetune.py"))["job"]
    with pytest.raises(ConfigError, match="the first argument must be a run's folder or a recipe"):
        job(words)
