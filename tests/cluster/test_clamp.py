"""CLaMP 2's stages on a real cluster: masked patches, then notation against texts and the other notation, beside what
is kept as it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muser_dist import Muser
from muser_dist.config import ModelConfig, ObjectiveConfig, RunConfig, Stage, Stages
from muser_dist.data.corpora.demo import compose
from muser_dist.models.model import MultimodalModel
from muser_dist.train.runlog import QUARANTINE, read_lines
from muser_dist.train.stages import pretrain_stages
from tests.scores import M3, NOTATION, TEXT, abc, midi, piece, symbolic_config, write_scores
from tests.shardmaker import write_shard
from tests.small import small_config


def stages(folder: Path, zero_stage: int) -> tuple[RunConfig, ...]:
    """The second stage carries an audio tower that no pair names, and a text tower that is frozen with its head."""
    train = {"workers": 2, "zero_stage": zero_stage, "samples": 64, "global_batch": 16, "chunk": 4}
    align = symbolic_config(TEXT, NOTATION, train=train)
    data = replace(align.data, train=(f"{folder}/train-*.tar",), val=(f"{folder}/val-*.tar",))
    small = small_config().model
    kept = {"freeze": True, "freeze_head": True}
    model = ModelConfig(
        symbolic=M3, audio=replace(small.audio, **kept), text=replace(small.text, **kept), projection_dim=8
    )
    align = replace(align, data=data, model=model, storage=str(folder), name=f"clamp-{zero_stage}")
    m3 = replace(
        align,
        model=ModelConfig(symbolic=replace(M3, build="m3_pretraining", options=M3.options | {"decoder_depth": 1})),
        objective=ObjectiveConfig("masked_patches", pairs=()),
    )
    return Stages((Stage("m3", m3), Stage("align", align, "towers"))).chained("clamp")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_both_stages_train_and_what_is_frozen_stays(cluster, tmp_path, zero_stage):
    write_scores(tmp_path, 24)
    write_scores(tmp_path, 8, name="val")
    broken = piece(1, "abc") | {"abc": b"no notes"}
    write_shard(tmp_path / "train-99999.tar", [("broken", broken), ("nothing", {"json": piece(0)["json"]})])
    runs = stages(tmp_path, zero_stage)
    folder = pretrain_stages(runs, ["test"])

    first, second = (read_lines(folder / name / "metrics.jsonl")[-1] for name in ("m3", "align"))
    assert not any(name.startswith(("variance", "temperature")) for name in first)
    assert {"loss/symbolic-text", "loss/symbolic-notation", "alignment/symbolic-notation"} <= second.keys()
    for line in (first, second):
        assert line["rows_read"] == line["rows_used"] + line["rows_quarantined"] == 64
    keys = {entry["key"] for entry in read_lines(folder / "align" / QUARANTINE)}
    assert keys == {"broken", "nothing"}

    before = MultimodalModel(runs[1]).state_dict()
    after = load_file(folder / "align" / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name.startswith(("towers.text.", "heads.text.", "towers.audio.", "heads.audio.")):
            assert torch.equal(after[name], value), name
    report = json.loads((folder / "align" / "weights.json").read_text())["symbolic"]
    assert not report["missing"]
    assert any(
        not torch.equal(after[name], value) for name, value in before.items() if name.startswith("towers.symbolic.")
    )

    scores = json.loads((folder / "align" / "evaluation.json").read_text())
    assert {"text->symbolic", "text->notation", "symbolic->notation"} <= scores["retrieval"].keys()
    muser = Muser.from_pretrained(folder)
    assert muser.encode_symbolic([abc(1), midi(1)]).shape == (2, 8)
    clip, rate, _ = compose(seed=0, index=1)
    assert muser.encode_audio([clip], rate).shape == (1, 8)
