import json
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest

from muser_dist.config import ObjectiveConfig
from muser_dist.data.chunks import Problem
from muser_dist.errors import StopTraining
from muser_dist.train.accounting import Accounting
from muser_dist.train.watch import check_share
from tests.small import small_config

PAIRS = (("audio", "text"), ("spectrogram", "text"))


def chunk(step: int, number: int, heard: list[bool], stated: list[bool], rows: list[int]) -> dict:
    problem = asdict(Problem(0, rows[0], "train", "s", "k", "", "r", 0))
    return {
        "step": np.int64(step),
        "chunk": np.int64(number),
        "row": np.array(rows),
        "key": [str(row) for row in rows],
        "epoch": np.array([row // 6 for row in rows]),
        "shard": ["s"] * len(rows),
        "source": ["train"] * len(rows),
        "crop": np.array(rows) / 10,
        "in_val": np.array([row == 5 for row in rows]),
        "seconds": np.float64(0.5),
        "heard": np.array(heard),
        "cached": np.array([row % 2 == 0 for row in rows]),
        "valid_audio": np.array(heard),
        "valid_spectrogram": np.array(heard),
        "valid_text": np.array(stated),
        "problems": [] if all(heard) and all(stated) else [json.dumps(problem)],
    }


def test_rows_read_are_used_or_quarantined():
    accounting = Accounting(PAIRS)
    accounting.add(chunk(0, 0, [True, False, True], [True, True, False], [4, 5, 6]))
    accounting.add(chunk(0, 1, [True, False], [True, False], [7, -1]))  # -1 pads
    problems = accounting.flush()
    totals = accounting.totals
    assert (totals["rows_read"], totals["rows_used"], totals["rows_quarantined"]) == (4, 2, 2)
    assert [(p["step"], p["row"]) for p in problems] == [(0, 4), (0, 7)]
    assert accounting.flush() == []
    place = {"source": "train", "shard": "s"}
    assert accounting.accounts() == [
        {**place, "pass": 0, "read": 2, "used": 1, "quarantined": 1},
        {**place, "pass": 1, "read": 2, "used": 1, "quarantined": 1},
    ]
    assert accounting.accounts() == []
    assert totals["rows_in_val"] == 1
    assert accounting.decode_ms_per_row() == 250
    assert accounting.clips() == {"clips_cached": 2, "clips_decoded": 1}
    assert accounting.clips() == {"clips_cached": 0, "clips_decoded": 0}


def test_an_objective_of_the_users_own_uses_what_any_tower_can_take():
    own = replace(small_config(), objective=ObjectiveConfig("package.module:loss", pairs=()))
    accounting = Accounting(own.taking_part)
    accounting.add(chunk(0, 0, [True, False, False], [False, True, False], [1, 2, 3]))
    accounting.flush()
    assert (accounting.totals["rows_used"], accounting.totals["rows_quarantined"]) == (2, 1)
    learning = replace(own, data=replace(own.data, classes=("instrument",)))
    assert learning.taking_part == (("audio", "label"), ("spectrogram", "label"), ("text", "label"))


def test_the_digest_tells_other_rows_and_another_order_but_not_when_it_was_flushed():
    a, b = chunk(0, 0, [True], [True], [1]), chunk(0, 1, [True], [True], [2])

    def digest(*groups):
        accounting = Accounting(PAIRS)
        for group in groups:
            for c in group:
                accounting.add(c)
            accounting.flush()
        return accounting.totals["digest"]

    padding = chunk(0, 2, [False], [False], [-1])
    assert digest([a, b]) == digest([a], [b]) == digest([b, a]) == digest([a, b, padding])
    assert digest([a]) != digest([a, b])
    assert digest([chunk(0, 0, [True], [True], [2]), chunk(0, 1, [True], [True], [1])]) != digest([a, b])
    resumed = Accounting(PAIRS, Accounting(PAIRS).totals | {"digest": digest([a])})
    resumed.add(b)
    resumed.flush()
    assert resumed.totals["digest"] == digest([a], [b])


def test_a_run_stops_when_too_many_rows_are_bad():
    reasons = Counter({"silent": 3, "no text": 250})
    check_share({"rows_read": 999, "rows_quarantined": 900}, reasons, 0.2)  # too early to tell
    check_share({"rows_read": 1000, "rows_quarantined": 200}, reasons, 0.2)
    with pytest.raises(
        StopTraining, match=r"747 of the first 1,000 rows .* \(250 times\): no text\. .*--data\.max-bad-share \(0\.2\)"
    ):
        check_share({"rows_read": 1000, "rows_quarantined": 253}, reasons, 0.2)
    with pytest.raises(StopTraining, match="none of the first 8 rows"):
        check_share({"rows_read": 8, "rows_quarantined": 8}, reasons, 1.0)
