"""jobs/mine_pairs.py on Ray makes what the same phases make in one process."""

import json

import numpy as np
import pytest

from jobs.mine_pairs import job
from muser_dist.errors import ClusterError, DataError
from muser_dist.interactions import readers
from muser_dist.interactions.job import run_phases
from muser_dist.interactions.log import LAYOUTS
from muser_dist.interactions.phases import Phase, Phases
from muser_dist.interactions.split import SplitConfig
from tests.interactions.cases import pairs_of, phases_of, run


@pytest.fixture
def logs(tmp_path):
    """Four files of sessions."""
    draw = np.random.default_rng(0)
    for number in range(4):
        lines = ["user,item,time,signal,value"]
        for _ in range(200):
            user, start = draw.integers(40), draw.integers(10**9, 11 * 10**8)
            lines += [f"user {user},song {draw.integers(60)},{start + 200 * i},play," for i in range(8)]
        (tmp_path / f"log-{number}.csv").write_text("\n".join(lines))
    return sorted(tmp_path.glob("log-*.csv"))


def result(folder):
    return sorted(pairs_of(folder), key=lambda row: [row[name] for name in ("split", "trigger", "item")])


def test_pairs_and_accounts_are_those_of_one_process(cluster, logs, tmp_path, capsys):
    split = SplitConfig(val_users=0.2, val_items=0.1)
    here = run(phases_of(logs, tmp_path / "here", LAYOUTS["events"], split=split))
    arguments = [f"{tmp_path}/log-*.csv", "--layout", "events", "--out", f"{tmp_path}/ray", "--partitions", "4"]
    arguments += ["--split.val-users", "0.2", "--split.val-items", "0.1"]
    job(arguments)
    first = capsys.readouterr()
    assert "4 of 4 tasks of 'read'" in first.err and f"{here['rows']:,} rows: {here['used']:,} used" in first.out
    summary = json.loads((tmp_path / "ray" / "summary.json").read_text())
    made_by = summary.pop("made_by")
    assert summary == {name: value for name, value in here.items() if name != "made_by"}
    assert made_by["command"].startswith("python jobs/mine_pairs.py")
    assert result(tmp_path / "ray") == result(tmp_path / "here") != []
    job(arguments)  # nothing is left to do
    second = capsys.readouterr()
    assert (second.out, second.err) == (first.out, "")


def test_what_was_made_stays_and_what_is_wrong_is_told(cluster, logs, tmp_path):
    phases = phases_of(logs, tmp_path / "out", LAYOUTS["events"])
    phases.claim({})
    content = logs[2].read_bytes()
    logs[2].unlink()
    with pytest.raises(DataError, match=r"log-2\.csv cannot be opened"):
        run_phases(phases, lambda phase: lambda done, total: None)
    logs[2].write_bytes(content)
    told = []
    run_phases(phases, lambda phase: lambda done, total: told.append((phase, done, total)))
    assert told[-1] == ("pairs", 4, 4) and ("read", 4, 4) in told
    assert len(readers.pieces_of(phases.storage, [str(path) for path in logs], LAYOUTS["events"])) == 4
    phases.finish({})
    run(phases_of(logs, tmp_path / "here", LAYOUTS["events"]))
    assert result(tmp_path / "out") == result(tmp_path / "here")


def test_nodes_that_write_elsewhere_do_not_keep_it_for_ever(cluster, logs, tmp_path, monkeypatch):
    monkeypatch.setattr("muser_dist.interactions.job.SHOWN_SECONDS", 1.0)

    class Elsewhere(Phases):
        """As on a node whose folder of that name is its own."""

        def run(self, phase: Phase, i: int) -> None:
            pass

    here = phases_of(logs, tmp_path / "out", LAYOUTS["events"])
    phases = Elsewhere(here.job, here.storage, here.folder)
    phases.claim({})
    with pytest.raises(ClusterError, match=r"4 tasks of 'read' are done.*every node must see that folder"):
        run_phases(phases, lambda phase: lambda done, total: None)
