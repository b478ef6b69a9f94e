"""CLaMP 3's five stages on a real cluster as one command, broken off in the middle; and features made on Ray."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muser_dist import Muser
from muser_dist.config import RunConfig
from muser_dist.data.shards import SIDECAR
from muser_dist.errors import MuserError
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.train.runlog import EVENTS, read_lines
from muser_dist.train.stages import pretrain_stages
from tests.cluster.plugins import arm
from tests.recipes.test_clamp3 import NAMES, small_stages
from tests.scores import abc
from tests.shardmaker import sample, write_shard
from tests.small import small_config
from tests.songs import song, write_songs

ROOT = Path(__file__).parents[2]
BATCH = 16


def stages(folder: Path, name: str) -> tuple[RunConfig, ...]:
    """Stages of 2 steps, but the one that is broken off of 8: a tower dies in its 6th."""
    runs = []
    for config in small_stages(folder, f"{folder}/train-*.tar", name, (f"{folder}/val-*.tar",)):
        steps = 8 if config.name == "joint" else 2
        train = {"workers": 2, "global_batch": BATCH, "chunk": 4, "samples": steps * BATCH, "max_failures": 0}
        model = config.model
        if model.features is not None:
            dying = replace(model.features, build="tests.cluster.plugins:DyingFeatures")
            model = replace(model, features=dying)
        trained = replace(config.train, **train, checkpoint_samples=2 * BATCH, cache_gradients=True)
        runs.append(replace(config, model=model, train=trained))
    return tuple(runs)


@pytest.mark.slow
def test_all_stages_train_and_a_broken_off_one_goes_on(cluster, tmp_path):
    write_songs(tmp_path, 24, "abc", "mid", "npy")
    write_songs(tmp_path, 8, "abc", "mid", "npy", name="val")
    straight = pretrain_stages(stages(tmp_path, "straight"), ["test"])
    runs = stages(tmp_path, "broken")
    # In a step a rank encodes each of its two chunks twice: in 2 steps of "audio" 8 passes, here the first of the 6th.
    arm(cluster, "kill", call=21, ranks=(0, 1))
    with pytest.raises(MuserError, match=r"goes on from step [24]\."):
        pretrain_stages(runs, ["test"])
    assert not (tmp_path / "broken" / "repair" / "model").exists()
    folder = pretrain_stages(runs, ["test"])
    starts = {name: [e["step"] for e in read_lines(folder / name / EVENTS) if e["event"] == "start"] for name in NAMES}
    assert starts.pop("joint") in ([0, 2], [0, 4])
    assert set(map(tuple, starts.values())) == {(0,)}

    left = [load_file(folder / name / "model" / "model.safetensors") for name in NAMES]
    uninterrupted = load_file(straight / "model" / "model.safetensors")
    assert left[-1].keys() == uninterrupted.keys()
    for name, weight in left[-1].items():
        assert torch.equal(weight, uninterrupted[name]), name
    trained = {"audio": set(), "joint": {"features", "text"}, "repair": {"symbolic"}}  # the first one's tower is new
    for stage, before, after in zip(NAMES[2:], left[1:], left[2:], strict=False):
        changed = {tuple(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}
        parts = {part for part in changed if part[0] != "logits"}
        assert parts == {(of, name) for of in ("towers", "heads") for name in trained[stage]}, stage

    for name in NAMES:
        line = read_lines(folder / name / "metrics.jsonl")[-1]
        assert line["rows_read"] == line["rows_used"] == (8 if name == "joint" else 2) * BATCH
    scores = json.loads((folder / "repair" / "evaluation.json").read_text())["retrieval"]
    assert {"features->symbolic", "symbolic->features", "notation->features", "text->features"} <= scores.keys()
    muser = Muser.from_pretrained(folder)
    assert (muser.encode_symbolic([abc(1)]) @ muser.encode_features([song(1), song(2)]).T).shape == (1, 2)


ON_GPUS = """
import sys, ray
from muser_dist.embed import job
ray.init("local", num_cpus=3, num_gpus=1, log_to_driver=False)  # no machine of the tests has a GPU
def on_the_cpu(model, sha256, device):
    from muser_dist import Muser
    return Muser.from_pretrained(model)
job.load_model = on_the_cpu
from jobs.embed import job as run
run(sys.argv[1:])
"""


@pytest.mark.slow
def test_shards_with_features_are_made_on_ray_and_only_what_is_missing_again(tmp_path):
    config = small_config()
    save_model(tmp_path / "model", MultimodalModel(config).state_dict(), config)
    for number in range(3):
        rows = [(f"piece{i:03d}", sample(i)) for i in range(8 * number, 8 * number + 8)]
        rows[2][1]["flac"] = b"no music"
        write_shard(tmp_path / f"music-{number}.tar", rows)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "model"), "--features", "--shards", f"{tmp_path}/music-*.tar"]
    for missing in ((), ("music-1.tar",)):
        for name in missing:
            (out / name).unlink()
        stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        done = run("jobs/embed.py", *arguments, "--out", str(out))
        assert done.returncode == 0, done.stderr[-5000:]
        assert "24 rows: 21 with features; 3 entries in" in done.stdout
        assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    assert json.loads((out / SIDECAR).read_text())["rows"] == {f"music-{number}.tar": 8 for number in range(3)}
    told = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [problem["key"] for problem in told] == ["piece002", "piece010", "piece018"]
    again = run("jobs/embed.py", *arguments, "--out", str(out), "--modalities", "spectrogram")
    assert again.returncode == 2 and "modality: 'audio' there, 'spectrogram' here" in again.stderr

    apart = tmp_path / "apart"
    done = run("-c", ON_GPUS, *arguments, "--gpu", "--out", str(apart))
    assert done.returncode == 0, done.stderr[-5000:]
    for path in sorted(out.glob("*.tar")):
        assert (apart / path.name).read_bytes() == path.read_bytes()
    none = run("jobs/embed.py", *arguments, "--gpu", "--out", str(tmp_path / "none"))
    assert none.returncode == 2 and "--gpu: the cluster has no GPU" in none.stderr


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
