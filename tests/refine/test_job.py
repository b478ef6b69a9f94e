"""jobs/refine_text.py before it starts Ray: options, the folder, and the key that is nowhere."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.refine_text import job
from muser_dist.cli import Progress
from muser_dist.data.rewriting import check_names
from muser_dist.data.shards import ShardIndex
from muser_dist.errors import ConfigError, DataError, MuserError
from muser_dist.files import alone_in
from muser_dist.refine.asker import Endpoint
from muser_dist.refine.job import MANIFEST, claim, refine
from muser_dist.refine.ledger import Prices
from muser_dist.refine.prompt import Prompt
from tests.shardmaker import sample, write_shard
from tests.small import LOCAL

PROMPT = Prompt("m", ("fr",))


def index(*urls: str) -> ShardIndex:
    return ShardIndex(list(urls), np.full(len(urls), 3), {})


def test_a_folder_is_of_one_job(tmp_path):
    out = tmp_path / "out"
    claim(out, index("/a/x.tar", "/a/y.tar"), PROMPT, {"commit": "c0ffee"})
    written = (out / MANIFEST).read_text()
    claim(out, index("/a/x.tar", "/a/y.tar"), PROMPT, {"commit": "later"})
    assert (out / MANIFEST).read_text() == written and json.loads(written)["made_by"] == {"commit": "c0ffee"}
    for shards, prompt, message in (
        (index("/a/x.tar"), PROMPT, r"\(shards differ"),
        (index("/a/x.tar", "/a/y.tar"), replace(PROMPT, model="n"), r"\(model differ"),
        (index("/a/x.tar", "/a/y.tar"), replace(PROMPT, languages=("fr", "ru")), r"\(languages differ"),
    ):
        with pytest.raises(DataError, match=message):
            claim(out, shards, prompt, {})
    (out / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match="is broken"):
        claim(out, index("/a/x.tar"), PROMPT, {})
    with pytest.raises(ConfigError, match=r"two shards are called x\.tar"):
        check_names(index("/a/x.tar", "/b/x.tar"), tmp_path / "new")
    with pytest.raises(ConfigError, match="would be overwritten"):
        check_names(index("/a/x.tar"), Path("/a"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.tar").touch()
    with pytest.raises(DataError, match=r"z\.tar was there before"):
        claim(tmp_path / "other", index("/a/x.tar"), PROMPT, {})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out: cannot write"):
        claim(tmp_path / "file", index("/a/x.tar"), PROMPT, {})


def test_two_jobs_do_not_share_a_folder(tmp_path):
    with alone_in(tmp_path), pytest.raises(DataError, match="another job works in"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out: cannot write"), alone_in(tmp_path / "file"):
        pass


def test_a_folder_that_another_job_works_in_is_not_claimed(tmp_path):
    with alone_in(tmp_path), pytest.raises(DataError, match="another job works in"):
        refine(index("/a/x.tar"), LOCAL, PROMPT, Endpoint("http://a"), Prices(1, 1), 1, tmp_path, {}, silent)
    assert not (tmp_path / MANIFEST).exists()


def silent(done: int, of: int, spent: str) -> None:
    pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--max-cost": "-1"}, "--max-cost is -1"),
        ({"--max-cost": "nan"}, "--max-cost is nan"),
        ({"--price-in": "-1"}, "--price-in is -1"),
        ({"--languages": "xx"}, "--languages: 'xx'"),
        ({"--parameters": "{"}, "--parameters is no JSON"),
        ({"--parameters": "[1]"}, "--parameters is no JSON object"),
        ({"--template": "missing.txt"}, r"--template: cannot read missing\.txt"),
        ({"--key-variable": "NO_SUCH_KEY"}, r"has no variable of that name; give a name"),
        ({"--endpoint": "localhost"}, "--endpoint must be a URL"),
        ({"--shards": "missing-*.tar"}, "--shards: missing-"),
    ],
)
def test_wrong_options_end_it_before_anything_is_made(tmp_path, changes, message):
    shard = write_shard(tmp_path / "in" / "a.tar", [("piece", sample(0))])
    options = {
        "--shards": str(shard),
        "--out": str(tmp_path / "out"),
        "--endpoint": "http://127.0.0.1:9/v1",
        "--model": "m",
        "--price-in": "1",
        "--price-out": "2",
        "--max-cost": "1",
    } | changes
    with pytest.raises(MuserError, match=message):
        job([part for option in options.items() for part in option])
    assert not (tmp_path / "out").exists()


def test_money_stands_in_the_line_of_progress(capsys):
    progress = Progress("rows")
    progress(0, 10, "0 tokens")
    progress(5, 10, "700 tokens, 0.1 of 2 spent")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "0 of 10 rows; 0 tokens"
    assert second.startswith("5 of 10 rows, ") and second.endswith(" s left; 700 tokens, 0.1 of 2 spent")
