"""Trials of a sweep that share decoded clips, next to trials that decode for themselves.

python benchmarks/sweep.py --json OUT.json     writes OUT.md beside it; twenty minutes on two cores
"""

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import head, provenance, say, table, write

from muser_dist.config import DataConfig, ModelConfig, ObjectiveConfig, PairConfig, RunConfig, TowerConfig, TrainConfig

PACKAGES = ("ray", "torch", "soundfile", "soxr", "numpy")
CLIP_SECONDS, RATE = 30.0, 44_100
BATCH, CHUNK = 16, 8
VAL_CLIPS = 16
_TOWER = {"width": 16, "depth": 1, "heads": 2}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the JSON and the page."""
    options = _options(argv)
    os.environ |= {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    results = provenance("benchmarks/sweep.py", options.given, PACKAGES)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
        make_shards(Path(folder), options)
        rows, difference = measure(Path(folder), options)
    by_round = [total(rows, round_, "without") / total(rows, round_, "with cache") for round_ in range(options.rounds)]
    setting = {name: getattr(options, name) for name in ("trials", "clips", "distinct", "crop_seconds", "cpus")}
    results |= {
        "gpu": None,
        "setting": setting,
        "rows": rows,
        "ratios": {"shared_decode_speedup": round(statistics.median(by_round), 4)},
        "ratios_by_round": {"shared_decode_speedup": by_round},
        "largest_difference_of_losses_from_a_run_alone": difference,
    }
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--clips", type=int, default=512, help="mp3 clips of thirty seconds; a trial is one pass")
    parser.add_argument("--distinct", type=int, default=24, help="clips that are composed; others repeat their sound")
    parser.add_argument("--crop-seconds", type=float, default=30.0, help="what a tower hears of a clip (MUSER: 30)")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of the cluster")
    parser.add_argument("--rounds", type=int, default=1, help="of both sweeps, which take turns")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured; default the temporary folder")
    options = parser.parse_args(argv)
    options.given = list(sys.argv[1:] if argv is None else argv)
    return options


# --- Data ---


def make_shards(folder: Path, options: argparse.Namespace) -> None:
    """Shards of 64 clips, and validation clips; no two files are equal, so none finds another's entry in the cache."""
    from ingest import _clip

    say(f"composing {options.distinct} clips")
    clips = [_clip(index, "mp3") for index in range(options.distinct)]
    for name, first, count in (("train", 0, options.clips), ("val", options.clips, VAL_CLIPS)):
        for shard in range(-(-count // 64)):
            with tarfile.open(folder / f"{name}-{shard:05d}.tar", "w") as tar:
                for row in range(shard * 64, min(count, shard * 64 + 64)):
                    members = dict(clips[(first + row) % options.distinct])
                    members["mp3"] += b"TAG" + f"clip {name} {row}".encode().ljust(125, b"\0")  # an ID3v1 tag
                    for extension, content in members.items():
                        info = tarfile.TarInfo(f"clip{row:05d}.{extension}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


def config_of(folder: Path, name: str, options: argparse.Namespace) -> RunConfig:
    """A model so small that decoding is most of the work: one audio tower of a few thousand parameters, and text.

    It hears a frame every 96 ms (HTCL's): the convolutions of the waveform tower took as long as half of the decoding.
    """
    return RunConfig(
        model=ModelConfig(
            audio=TowerConfig("htcl_audio", _TOWER | {"channels": 16, "mels": 64, "window": 2048, "hop": 1536}),
            text=TowerConfig("text", _TOWER),
            projection_dim=16,
        ),
        data=DataConfig(
            train=(f"{folder}/train-*.tar",),
            val=(f"{folder}/val-*.tar",),
            crop_seconds=options.crop_seconds,
            keep_clips=name.startswith("with-cache"),
            cache_folder=f"{folder}/cache-{name}",
            decode_slots=1,
            buffer_mib=1,  # as few chunks ahead as can be, so that what a pass takes shows in its steps
        ),
        objective=ObjectiveConfig(pairs=(PairConfig("audio", "text"),)),
        train=TrainConfig(
            workers=1,
            samples=options.clips // BATCH * BATCH,
            global_batch=BATCH,
            chunk=CHUNK,
            warmup_samples=BATCH,
            log_steps=1,
            checkpoint_samples=options.clips,
            cache_gradients=False,
        ),
        storage=str(folder / "runs"),
        name=name,
    )


# --- Measurements ---


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """A row for each trial, and how far the losses of the last one are from those of a run alone."""
    import ray

    from muser_dist.sweep.config import SweepConfig
    from muser_dist.sweep.launch import sweep
    from muser_dist.sweep.plan import config_of as config_of_trial
    from muser_dist.sweep.plan import plan
    from muser_dist.train.launch import pretrain

    space = folder / "space.json"
    space.write_text(json.dumps({"objective.temperature.init": {"log_uniform": [0.05, 0.5]}}))
    rules = SweepConfig(str(space), trials=options.trials, early_stopping="none")
    ray.init("local", num_cpus=options.cpus, log_to_driver=False)  # with its dashboard, as sweeps need it
    rows = []
    for round_ in range(options.rounds):
        for case in ("without", "with cache") if round_ % 2 == 0 else ("with cache", "without"):
            base = config_of(folder, f"{case.replace(' ', '-')}-{round_}", options)
            sweep("tiny", base, rules, ["benchmarks/sweep.py"])
            planned = plan("tiny", base, rules)
            for trial in planned.record.trials:
                row = {"case": case, "round": round_, "trial": trial.number}
                rows.append(row | seconds_of(config_of_trial(planned.base, trial), trial.seconds))
                say(f"{case}, trial {trial.number}: a pass of {rows[-1]['pass_seconds']:.1f} s")
    config = config_of_trial(planned.base, planned.record.trials[-1])
    alone = pretrain(replace(config, name="alone"), ["benchmarks/sweep.py"])
    return rows, max(abs(a - b) for a, b in zip(losses(config.folder), losses(alone), strict=True))


def seconds_of(config: RunConfig, seconds: float) -> dict[str, float]:
    """Of one trial: a pass at the speed of all steps but the first, and the rest, which is start-up and scoring."""
    from muser_dist.train.runlog import METRICS, read_lines

    lines = read_lines(config.folder / METRICS)
    measured = lines[-1]["time"] - lines[0]["time"]
    whole = measured * lines[-1]["samples"] / (lines[-1]["samples"] - lines[0]["samples"])
    cached = sum(line.get("clips_cached", 0) for line in lines)
    return {"pass_seconds": whole, "startup_seconds": seconds - whole, "trial_seconds": seconds, "clips_cached": cached}


def losses(folder: Path) -> list[float]:
    """Of the first 20 steps."""
    from muser_dist.train.runlog import METRICS, read_lines

    return [line["loss"] for line in read_lines(folder / METRICS)][:20]


def total(rows: list[dict[str, Any]], round_: int, case: str) -> float:
    """Seconds of all passes of one sweep."""
    return sum(row["pass_seconds"] for row in rows if (row["round"], row["case"]) == (round_, case))


def page(results: dict[str, Any], name: str) -> str:
    """The page beside the JSON."""
    setting, rows = results["setting"], results["rows"]
    lines = []
    for case in ("without", "with cache"):
        of_case = [row for row in rows if row["case"] == case]
        passes = [row["pass_seconds"] for row in of_case]
        first = statistics.median(row["pass_seconds"] for row in of_case if row["trial"] == 0)
        rounds = len({row["round"] for row in of_case})
        start = statistics.median(row["startup_seconds"] for row in of_case)
        cells = (sum(passes) / rounds, first, statistics.median(passes), start)
        lines.append([case, *(f"{value:.1f} s" for value in cells)])
    titles = ["", "all passes of a sweep", "the first trial's", "a trial's, median", "start-up of a trial, median"]
    compared = (
        f"{setting['trials']} trials of one pass each, no early stopping, over {setting['clips']} mp3 clips of 30 s "
        f"(44.1 kHz, stereo, 160 kbit/s; {setting['distinct']} different pieces, each file with a tag of its own), on "
        f"a cluster of {setting['cpus']} CPUs that both sweeps run on in turn. A tower hears "
        f"{setting['crop_seconds']:g} s of a clip. The model is so small that decoding is most of the work: with a "
        "larger one less is won. The cache is empty when its sweep begins. A pass goes by the speed of all steps but "
        "the first; what a trial takes besides, start of its processes and scoring, is the start-up."
    )
    speedup = results["ratios"]["shared_decode_speedup"]
    found = (
        f"`shared_decode_speedup`, all passes without the cache over all with it: **{speedup:.2f}**. The losses of a "
        f"trial's first 20 steps are at most {results['largest_difference_of_losses_from_a_run_alone']:.1e} from those "
        "of the same config run alone."
    )
    return (
        "\n\n".join([head("Trials that share decoding", results, name), compared, table(titles, lines), found]) + "\n"
    )


if __name__ == "__main__":
    main()
