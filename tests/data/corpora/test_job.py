"""jobs/make_shards.py for corpora of files: what it prints can be run."""

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from muser_dist.cli import parse_runs
from muser_dist.data.text import check_templates
from tests.data.corpora.layouts import LAYOUTS
from tests.data.corpora.score_layouts import SCORES

JOB = Path(__file__).parents[3] / "jobs" / "make_shards.py"
OPTIONS = {
    "table": ["--table", "ROOT/tracks.csv", "--audio", "file", "--split", "part"],
    "gtzan": ["--root", "ROOT", "--splits", "ROOT"],
    "fma": ["--root", "ROOT"],
    "magnatagatune": ["--root", "ROOT"],
    "jamendo": ["--metadata", "ROOT/data", "--audio", "ROOT/audio", "--split", "None"],
    "folder": ["--root", "ROOT"],
    "wikimt": ["--file", "ROOT/wikimusictext.jsonl"],
    "midicaps": ["--root", "ROOT", "--val-share", "0"],
    "clamp": ["--file", "ROOT/clamp.jsonl", "--val-share", "0.4"],
}
ALL = LAYOUTS | SCORES


@pytest.fixture
def make_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """jobs/make_shards.py, called with command line arguments."""

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", [str(JOB), *arguments])
        runpy.run_path(str(JOB), run_name="__main__")

    return call


@pytest.mark.parametrize("name", OPTIONS)
def test_what_comes_next_can_be_run(cluster, make_shards, tmp_path: Path, capsys, name: str):
    ALL[name].make(tmp_path)
    options = [option.replace("ROOT", str(tmp_path)) for option in OPTIONS[name]]
    make_shards(name, "--out", f"{tmp_path}/the shards", "--shard-rows", "4", *options)
    out, err = capsys.readouterr()
    rows = dict(re.findall(r"^(train|val|test): ([\d,]+) tracks, \d+ shards: '", out, re.M))
    want = {"train": 12} if name == "jamendo" else ALL[name].rows
    assert {split: int(count) for split, count in rows.items()} == want
    files = ", and 2 files of other tracks" if name == "clamp" else ""
    assert f"skipped: {ALL[name].skipped:,} tracks{files}; {tmp_path}/the shards/skipped.jsonl says" in out
    assert f"{sum(want.values())} of {sum(want.values())} tracks" in err
    command = shlex.split(out.splitlines()[-1])
    if name == "wikimt":
        assert command[1:6] == ["python", "jobs/evaluate.py", "MODEL", "--val", f"{tmp_path}/the shards/test-*.tar"]
        check_templates(tuple(command[command.index("--templates") + 1 :]))
        return
    assert command[:3] == ["next:", "python", "jobs/pretrain.py"]
    *_, config = parse_runs(command[3:], "jobs/pretrain.py")
    assert (config.model.symbolic is not None) == (name in SCORES)
    assert config.data.train == (f"{tmp_path}/the shards/train-*.tar",)
    check_templates(config.data.templates)
    if name == "table":
        assert config.data.templates == ("{title}, {instrument}, {year}",)


def test_an_index_of_shards_that_are_there(cluster, make_shards, tmp_path: Path, capsys):
    LAYOUTS["table"].make(tmp_path)
    make_shards("table", "--out", str(tmp_path / "out"), "--table", f"{tmp_path}/tracks.csv", "--audio", "file")
    (tmp_path / "out" / "muser-index.json").unlink()
    make_shards("index", "--folder", str(tmp_path / "out"))
    assert capsys.readouterr().out.endswith(f"{tmp_path}/out/muser-index.json: 12 rows in 1 shards\n")


@pytest.mark.parametrize("name", [*OPTIONS, "index"])
def test_every_command_explains_its_options(make_shards, capsys, name: str):
    with pytest.raises(SystemExit) as exit_:
        make_shards(name, "--help")
    assert exit_.value.code == 0
    help_ = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for option in [option for option in OPTIONS.get(name, ["--folder"]) if option.startswith("--")]:
        assert option in help_


def test_mistakes_are_said_in_one_line(make_shards, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as exit_:
        make_shards("fma", "--out", str(tmp_path / "out"), "--root", str(tmp_path))
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
