"""Frozen, recomputed and cached towers over DeepSpeed: every ZeRO stage, against one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.registry import load_objective
from muser_dist.train.checkpoint import Pieces
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import Recording, config_for, expected, global_chunks, on_device
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.workers import run_workers
from tests.models.test_frozen import with_towers

CPU = torch.device("cpu")
FROZEN = ("towers.spectrogram", "towers.text")
FREEZE, RECOMPUTE, COMPILE = {"freeze": True}, {"checkpoint_activations": True}, {"compile": True}

CASES: dict[str, dict[str, dict[str, bool]]] = {
    "frozen and recomputed": {"audio": RECOMPUTE, "spectrogram": FREEZE, "text": FREEZE},
    "recomputed": {"audio": RECOMPUTE, "spectrogram": RECOMPUTE, "text": RECOMPUTE},
    "trained": {},
    "compiled": {"audio": COMPILE, "spectrogram": COMPILE, "text": COMPILE},
}


def config_of(case: str, workers: int, stage: int = 0, **text: object) -> RunConfig:
    config = config_for("InfoNCE, same text", workers, 4, stage)
    # Some layers are large enough for ZeRO-3 to share them out: DeepSpeed leaves those below 100,000 weights whole.
    wide = {"width": 192, "depth": 2, "heads": 2}
    sizes = {"depths": [1, 1, 1, 2], "dims": [8, 8, 8, 192], "mels": 32, "window": 256, "hop": 80}
    options = {"audio": {"options": wide}, "spectrogram": {"options": sizes}, "text": {"options": wide}}
    changes = {name: options[name] | CASES[case].get(name, {}) for name in config.model.towers()}
    return with_towers(config, **(changes | {"text": changes["text"] | text}))


def worker(rank: int, world: int, folder: str, cases: dict[str, list[int]], kept: list[int], cached: list[int]) -> None:
    """Saves the gradients of each case at its stages, weights around a checkpoint, and gradients with a cache."""
    for case, stages in cases.items():
        for stage in stages:
            config = config_of(case, world, stage)
            recording = Recording(DeepSpeedEngine(MultimodalModel(config), config, CPU))
            mine = on_device(global_chunks(config)[rank::world], config)
            train_step(recording, load_objective(config.objective), config, mine, 1.0)
            if rank == 0:
                torch.save((case, recording.gradients), f"{folder}/gradients-{case}-{stage}.pt")
    for stage in kept:
        go_on(rank, world, folder, stage)
    for stage in cached:
        hit(rank, world, folder, stage)


def steps(engine: DeepSpeedEngine, config: RunConfig, rank: int, world: int, count: int) -> None:
    mine = on_device(global_chunks(config, messy=False)[rank::world], config)
    for _ in range(count):
        train_step(engine, load_objective(config.objective), config, mine, 1.0)


def go_on(rank: int, world: int, folder: str, stage: int) -> None:
    """Two steps, a checkpoint, and the same checkpoint in an engine whose weights were others."""
    config = config_of("frozen and recomputed", world, stage)
    engine = DeepSpeedEngine(MultimodalModel(config), config, CPU)
    initial = engine.state_dict()
    steps(engine, config, rank, world, 2)
    save_file(engine.snapshot(), f"{folder}/checkpoint-{stage}-{rank}")
    dist.barrier()
    trained = engine.state_dict()
    other = DeepSpeedEngine(MultimodalModel(replace(config, seed=1)), config, CPU)
    with Pieces([Path(f"{folder}/checkpoint-{stage}-{of_rank}") for of_rank in range(world)]) as read:
        other.restore(read, 2)
    loaded = other.state_dict()
    if rank == 0:
        torch.save((initial, trained, loaded), f"{folder}/weights-{stage}.pt")


def hit(rank: int, world: int, folder: str, stage: int) -> None:
    """A step with a cache that knows all texts of rank 0, which does not run its tower, and none of the others'."""
    case = "frozen and recomputed"
    config = config_of(case, world, stage, cache_rows=50)
    engine = DeepSpeedEngine(MultimodalModel(config), config, CPU)
    mine = on_device(global_chunks(config)[rank::world], config)
    if rank == 0:
        with torch.no_grad():
            for chunk in mine:
                engine.model(chunk.tensors(), (-1, 0))
    encoded: list[int] = []
    engine.model.towers["text"].register_forward_hook(lambda *_: encoded.append(1))
    recording = Recording(engine)
    train_step(recording, load_objective(config.objective), config, mine, 1.0)
    assert len(encoded) == (0 if rank == 0 else len(mine))
    if rank == 0:
        torch.save((case, recording.gradients), f"{folder}/gradients-cached-{stage}.pt")


def check_gradients(folder: Path, cells: int) -> None:
    """Those of all cells, against float64 in one process; of the options only freezing changes them."""
    frozen, trained = config_of("frozen and recomputed", 1), config_of("trained", 1)
    exact = {"frozen and recomputed": expected(with_towers(frozen, audio={"checkpoint_activations": False}))[1]}
    exact |= dict.fromkeys(("recomputed", "compiled"), expected(trained)[1])
    files = sorted(folder.glob("gradients-*.pt"))
    assert len(files) == cells
    for file in files:
        case, got = torch.load(file)
        assert any(name.startswith(FROZEN) for name in got) == (case != "frozen and recomputed")
        worst = max(errors(got, exact[case]).items(), key=lambda item: item[1])
        assert worst[1] <= TOLERANCE, (file.name, worst)


def check_weights(folder: Path, cells: int) -> None:
    """Frozen ones never change, the others do, and all come back from a checkpoint."""
    files = sorted(folder.glob("weights-*.pt"))
    assert len(files) == cells
    for file in files:
        initial, trained, loaded = torch.load(file)
        for name, value in initial.items():
            if name.startswith("towers."):
                assert torch.equal(trained[name], value) == name.startswith(FROZEN), (file.name, name)
            assert torch.equal(loaded[name], trained[name]), (file.name, name)


def test_towers_over_two_ranks_equal_one_process(tmp_path):
    run_workers(worker, 2, 2, str(tmp_path), {"frozen and recomputed": [3]}, [3], [2])
    check_gradients(tmp_path, 2)
    check_weights(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_towers_at_every_stage_equal_one_process(tmp_path, world):
    stages = [0, 1, 2, 3]
    cases = {"frozen and recomputed": stages, "recomputed": stages}
    run_workers(worker, world, world, str(tmp_path), cases, stages, stages[:3])
    check_gradients(tmp_path, 11)
    check_weights(tmp_path, 4)


@pytest.mark.slow
def test_compiled_towers_over_two_ranks_equal_one_process(tmp_path):
    run_workers(worker, 2, 2, str(tmp_path), {"compiled": [2]}, [], [])
    check_gradients(tmp_path, 1)
