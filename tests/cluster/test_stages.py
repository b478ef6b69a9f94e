"""A recipe in two stages on a real cluster, in HTCL's manner: semantics first, then songs that are liked together."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from muser_dist import Muser
from muser_dist.config import ObjectiveConfig, PairConfig, RunConfig, Stage, Stages
from muser_dist.errors import MuserError
from muser_dist.train.runlog import EVENTS, read_lines
from muser_dist.train.stages import pretrain_stages
from tests.cluster.plugins import arm
from tests.shardmaker import encode, tone
from tests.small import small_config

SEMANTIC = (PairConfig("audio", "text"),)
PREFERENCE = (*SEMANTIC, PairConfig("audio", "partner"), PairConfig("audio", "fused"))


def stages(corpus: Path, storage: Path, pairs: Path, name: str) -> tuple[RunConfig, ...]:
    fields = {
        "train": {"workers": 2, "samples": 128, "global_batch": 16, "chunk": 4, "checkpoint_samples": 32},
        "model": replace(small_config().model, spectrogram=None),
        "storage": str(storage),
        "name": name,
    }
    data = {"train": (f"{corpus}/train-*.tar",), "val": (f"{corpus}/val-*.tar",)}
    first = small_config(objective=ObjectiveConfig(pairs=SEMANTIC), data=data, **fields)
    objective = ObjectiveConfig(name="tests.cluster.plugins:faulty", pairs=PREFERENCE, exclude_liked=True)
    second = small_config(objective=objective, data=data | {"pairs": str(pairs), "max_bad_share": 0.5}, **fields)
    second = replace(second, train=replace(second.train, max_failures=0))
    return Stages((Stage("semantic", first), Stage("preference", second))).chained("htcl")


@pytest.mark.slow
def test_both_stages_train_and_a_broken_off_second_goes_on(cluster, corpus, tmp_path):
    names = [f"piece{i:03d}" for i in range(48)]
    pairs = tmp_path / "pairs.parquet"
    items = [names[(i * 7 + 1) % 48] for i in range(48)]
    pq.write_table(pa.table({"trigger": names, "item": items, "weight": [1.0] * 48}), pairs)

    straight = pretrain_stages(stages(corpus, tmp_path, pairs, "straight"), ["test"])
    runs = stages(corpus, tmp_path, pairs, "broken")
    arm(cluster, "kill", call=7, ranks=(0, 1))
    with pytest.raises(MuserError, match=r"goes on from step [24]\."):  # writing takes as long as some of these steps
        pretrain_stages(runs, ["test"])
    folder = pretrain_stages(runs, ["test"])
    assert [e["step"] for e in read_lines(folder / "semantic" / EVENTS) if e["event"] == "start"] == [0]
    starts = [e["step"] for e in read_lines(folder / "preference" / EVENTS) if e["event"] == "start"]
    assert starts in ([0, 2], [0, 4])

    first, last = (load_file(folder / name / "model" / "model.safetensors") for name in ("semantic", "preference"))
    uninterrupted = load_file(straight / "model" / "model.safetensors")
    assert last.keys() == uninterrupted.keys() and any(name.startswith("fusion.") for name in last)
    for name, weight in last.items():
        assert (weight == uninterrupted[name]).all(), name
    report = json.loads((folder / "preference" / "weights.json").read_text())["start"]
    assert set(report["matched"]) == set(first), "all of the first stage is taken over"
    assert {name.partition(".")[0] for name in report["missing"]} == {"fusion", "logits"}
    line = read_lines(folder / "preference" / "metrics.jsonl")[-1]
    assert {"loss/audio-text", "loss/audio-partner", "loss/audio-fused", "grad_norm/fusion"} <= line.keys()
    assert {"alignment/audio-partner", "alignment/audio-fused", "temperature/audio-fused"} <= line.keys()
    assert line["grad_norm/fusion"] > 0
    assert line["rows_read"] == line["rows_used"] + line["rows_quarantined"] == 128

    # One model, which hears audio alone.
    song = tmp_path / "song.flac"
    song.write_bytes(encode(tone(3)))
    muser = Muser.from_pretrained(folder)
    assert muser.encode_audio([song]).shape == (1, 8)
    assert (folder / "model").resolve() == (folder / "preference" / "model").resolve()
