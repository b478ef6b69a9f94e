"""docs/recommendation.md does what it says, on shards and embeddings of the shapes that it names."""

import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.shardmaker import sample, write_shard

ROOT = Path(__file__).parents[1]


def test_its_commands_run(tmp_path, monkeypatch, capsys):
    for name, first in (("train", 0), ("val", 60)):
        rows = [(f"piece{i:03d}", sample(i, type=("jig", "reel", "waltz")[i % 3])) for i in range(first, first + 60)]
        write_shard(tmp_path / "DATA" / f"{name}-00000.tar", rows)
    keys = [f"piece{i:03d}" for i in range(120)]
    rng = np.random.default_rng(0)
    for folder in ("stage-1", "stage-2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").write_text("{}")
        for part in range(2):
            vectors = [None, *rng.normal(size=(59, 4)).astype(np.float32).tolist()]  # one could not be embedded
            columns = {
                "key": keys[60 * part : 60 * part + 60],
                "spectrogram_embedding": pa.array(vectors, pa.list_(pa.float32(), 4)),
            }
            pq.write_table(pa.table(columns), tmp_path / folder / f"part-{part:05d}.parquet")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "recommendation.md").read_text()
    ((command,), (program,)) = (re.findall(rf"```{language}\n(.*?)```", page, re.S) for language in ("bash", "python"))
    python, job, *arguments = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr("sys.argv", [job, *arguments, "--listeners", "40"])
    runpy.run_path(str(ROOT / job), run_name="__main__")
    exec(program, {})
    said = capsys.readouterr().out
    assert "40 listeners, 120 clips" in said and "of the way from stage 1 to the oracle" in said
    result = json.loads((tmp_path / "recommendation.json").read_text())
    assert result["counts"]["items"] == 118 and "SIMULATED" in result["simulated"]["note"]
    assert {"matrix factorisation", "oracle", "stage 2"} <= {row["method"] for row in result["rows"]}
