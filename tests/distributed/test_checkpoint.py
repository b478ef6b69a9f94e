"""Checkpoints: the same bits on any number of ranks and at any ZeRO stage; broken ones are found; storage may fail."""

import contextlib
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from muser_dist.config import RunConfig, TowerConfig
from muser_dist.errors import CheckpointError
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.contrastive import contrastive
from muser_dist.train.checkpoint import Checkpoints, Position
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.optimizer import AVERAGE
from muser_dist.train.runlog import EVENTS, RunLog, read_lines
from muser_dist.train.step import train_step
from muser_dist.train.store import CheckpointStore
from tests.distributed.engine_cells import config_for, global_chunks, on_device
from tests.distributed.workers import run_workers
from tests.small import LOCAL

CPU = torch.device("cpu")
TOTALS = {"rows_read": 24, "digest": "abc"}


def config_of(folder: Path, world: int, stage: int, name: str, **train: object) -> RunConfig:
    """Two chunks a rank, so that gradients are cached; dropout; a moving average."""
    config = config_for("InfoNCE, same text", world, 6, stage, ema_samples=20, **train)
    text = TowerConfig("text", {"width": 16, "depth": 1, "heads": 2, "dropout": 0.3})
    config = replace(config, model=replace(config.model, text=text), storage=str(folder), name=name)
    config.folder.mkdir(exist_ok=True, parents=True)
    return config


def train_on(engine: DeepSpeedEngine, config: RunConfig, steps: range) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in steps:
        chunks = [chunk | {"step": torch.tensor(step).numpy()} for chunk in global_chunks(config, messy=False)]
        train_step(engine, contrastive, config, on_device(chunks[rank::world], config), 1.0)


def checkpoints_of(config: RunConfig, keep: int = 2) -> Checkpoints:
    log = RunLog(config, dist.get_world_size()) if dist.get_rank() == 0 else None
    return Checkpoints(CheckpointStore(config, LOCAL), keep, config.train.checkpoint_patience, log)


def engine_of(config: RunConfig) -> DeepSpeedEngine:
    return DeepSpeedEngine(MultimodalModel(config), config, CPU)


def whole(snapshots: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All states of all parameters, put together from the snapshots of all ranks; each element occurs once."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for snapshot in snapshots:
        for key, values in snapshot.items():
            name, _, start = key.rpartition("@")
            pieces.setdefault(name, []).append((int(start), values))
    out = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        assert [start for start, _ in parts] == [sum(len(p[1]) for p in parts[:i]) for i in range(len(parts))], name
        out[name] = torch.cat([values for _, values in parts])
    return out


def saver(rank: int, folder: str, stages: list[int]) -> None:
    """Trains two steps, saves, and trains a third."""
    world = dist.get_world_size()
    for stage in stages:
        config = config_of(Path(folder), world, stage, f"{world}-{stage}")
        engine, checkpoints = engine_of(config), checkpoints_of(config)
        train_on(engine, config, range(2))
        checkpoints.save(engine, Position(2, TOTALS, 1.5), 0.5)
        torch.save(engine.snapshot(), config.folder / f"snapshot-{rank}.pt")
        train_on(engine, config, range(2, 3))  # while it is being written
        assert checkpoints.finish() == 2
        weights = engine.state_dict()
        if rank == 0:
            torch.save(weights, config.folder / "straight.pt")


def loader(rank: int, folder: str, cells: list[tuple[int, int, int]]) -> None:
    """Goes on from checkpoints of so many ranks at a stage, at another stage."""
    world = dist.get_world_size()
    for saved_by, saved_at, stage in cells:
        config = config_of(Path(folder), world, stage, f"{saved_by}-{saved_at}")
        engine = engine_of(config)
        position = checkpoints_of(config).load(engine)
        assert position == Position(2, TOTALS, 1.5)
        torch.save(engine.snapshot(), config.folder / f"loaded-{world}-{stage}-{rank}.pt")
        train_on(engine, config, range(2, 3))
        weights = engine.state_dict()
        if rank == 0:
            torch.save(weights, config.folder / f"resumed-{world}-{stage}.pt")


def check_cells(folder: Path, cells: dict[int, list[tuple[int, int, int]]]) -> None:
    """By the number of ranks that load: (ranks that saved, their stage, the stage now)."""
    for saved_by in {saved_by for own in cells.values() for saved_by, _, _ in own}:
        stages = sorted({at for own in cells.values() for by, at, _ in own if by == saved_by})
        run_workers(saver, saved_by, str(folder), stages)
    for world, own in cells.items():
        # ZeRO-3 leaves another torch.nn.functional.linear behind in its process, which sums gradients of biases in
        # another order; a run has one engine in a process. So its cells are the last ones, as the saver's stages are.
        run_workers(loader, world, str(folder), sorted(own, key=lambda cell: cell[2]))
        for saved_by, saved_at, stage in own:
            run, cell = folder / f"{saved_by}-{saved_at}", (saved_by, saved_at, world, stage)
            saved = whole([torch.load(run / f"snapshot-{rank}.pt") for rank in range(saved_by)])
            loaded = whole([torch.load(run / f"loaded-{world}-{stage}-{rank}.pt") for rank in range(world)])
            assert saved.keys() == loaded.keys() and any(name.startswith(f"{AVERAGE}/") for name in saved)
            for name, values in saved.items():
                assert torch.equal(loaded[name], values), (name, cell)
            straight, resumed = torch.load(run / "straight.pt"), torch.load(run / f"resumed-{world}-{stage}.pt")
            for name, values in straight.items():
                if (saved_by, saved_at) == (world, stage) or f"{AVERAGE}/{name}" not in saved:  # a buffer
                    assert torch.equal(resumed[name], values), (name, cell)
                elif not name.endswith(("k_proj.bias", "key.bias")):  # their gradients are rounding, see test_engine
                    moved = (values.flatten() - saved[f"{AVERAGE}/{name}"]).norm()
                    assert (resumed[name] - values).norm() <= 1e-3 * moved + 1e-6, (name, cell)  # as in test_engine


def test_any_number_of_ranks_goes_on_at_any_stage_with_the_same_bits(tmp_path):
    cells = {
        1: [(2, 1, 2), (2, 3, 0)],
        2: [(2, stage, stage) for stage in range(4)],
        3: [(2, 2, 3), (2, 0, 1)],
    }
    check_cells(tmp_path, cells)


@pytest.mark.slow
def test_every_cell_of_the_matrix(tmp_path):
    matrix = [(by, at, now) for by in (1, 2, 3) for at in range(4) for now in range(4)]
    check_cells(tmp_path, dict.fromkeys((1, 2, 3), matrix))


# --- Files ---


def loaded_step(config: RunConfig) -> int:
    position = checkpoints_of(config).load(engine_of(config))
    assert position is not None
    return position.step


def keeps_and_passes_over(rank: int, folder: Path) -> None:
    """Of five checkpoints the last two and the best stay; damage one after the other."""
    config = config_of(folder, dist.get_world_size(), 2, "several")
    engine, checkpoints = engine_of(config), checkpoints_of(config)
    for step, loss in ((1, 0.9), (2, 0.1), (3, 0.5), (4, 0.4), (5, 0.3)):
        checkpoints.save(engine, Position(step, TOTALS, 1.5), loss)
    checkpoints.finish()
    places = {step: config.folder / f"checkpoint-{step:08d}" for step in (2, 4, 5)}
    assert sorted(config.folder.glob("checkpoint-*")) == list(places.values())
    dist.barrier()
    if rank == 0:
        part = places[5] / "rank-00001.safetensors"
        part.write_bytes(part.read_bytes()[:-100])
    dist.barrier()
    assert loaded_step(config) == 4
    if rank == 0:
        part = places[4] / "rank-00000.safetensors"
        flipped = bytearray(part.read_bytes())
        flipped[len(flipped) // 2] ^= 1
        part.write_bytes(flipped)
    dist.barrier()
    assert loaded_step(config) == 2
    if rank == 0:
        described = places[2] / "checkpoint.json"
        described.write_text(json.dumps(json.loads(described.read_text()) | {"format": 1}))
        errors = [e["error"] for e in read_lines(config.folder / EVENTS) if e["event"] == "broken checkpoint"]
        assert "rank-00001.safetensors has" in errors[0] and "another SHA-256" in errors[1]
    dist.barrier()
    for _ in range(2):  # it is not taken for a run without checkpoints the next time
        with pytest.raises(CheckpointError, match=r"none of the checkpoints at steps 2 in .* is intact .*format 1"):
            loaded_step(config)


class Unreachable(CheckpointStore):
    """Storage that does not answer one of two ranks."""

    def fetch(self, step: int, name: str, folder: str) -> Path:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return super().fetch(step, name, folder)


def does_not_blame_a_checkpoint_for_its_storage(rank: int, folder: Path) -> None:
    config = config_of(folder, dist.get_world_size(), 2, "unreachable", checkpoint_patience=1.0)
    engine, checkpoints = engine_of(config), checkpoints_of(config)
    for step in (1, 2):
        checkpoints.save(engine, Position(step, TOTALS, 1.5), None)
    checkpoints.finish()
    log = RunLog(config, 2) if rank == 0 else None
    unable = Checkpoints(Unreachable(config, LOCAL), 2, config.train.checkpoint_patience, log)
    with pytest.raises(CheckpointError, match=r"step 2 in .* cannot be read \(rank 1: .*No space.*goes on when"):
        unable.load(engine)
    assert loaded_step(config) == 2


def misses_a_part(rank: int, folder: Path) -> None:
    config = config_of(folder, dist.get_world_size(), 2, "missing")
    engine, checkpoints = engine_of(config), checkpoints_of(config)
    for step in (1, 2):
        checkpoints.save(engine, Position(step, TOTALS, 1.5), None)
    checkpoints.finish()
    if rank == 0:
        (config.folder / "checkpoint-00000002" / "rank-00001.safetensors").unlink()
    dist.barrier()
    assert loaded_step(config) == 1
    dist.barrier()
    (error,) = (e["error"] for e in read_lines(config.folder / EVENTS) if e["event"] == "broken checkpoint")
    assert error == "rank-00001.safetensors is missing"


class Slow(CheckpointStore):
    """Storage that takes longer for one of two ranks."""

    def write(self, step: int, name: str, content: bytes) -> dict:
        if dist.get_rank() == 1:
            time.sleep(2.5)
        return super().write(step, name, content)


def does_not_take_a_slow_storage_for_a_hang(rank: int, folder: Path) -> None:
    config = config_of(folder, dist.get_world_size(), 2, "slow")
    checkpoints = Checkpoints(Slow(config, LOCAL), 2, 60.0, RunLog(config, 2) if rank == 0 else None)
    checkpoints.save(engine_of(config), Position(2, TOTALS, 1.5), None)
    times, reduce = 0, dist.all_reduce

    def counted(*arguments: object) -> None:
        nonlocal times
        times += 1
        reduce(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        assert checkpoints.finish() == 2
    assert times > 2  # the ranks meet while the part is written, and not only when it is and when all is


def fails_for_good(rank: int, folder: Path) -> None:
    config = config_of(folder, dist.get_world_size(), 2, "full", checkpoint_patience=1.0)
    engine, checkpoints = engine_of(config), checkpoints_of(config)
    checkpoints.save(engine, Position(1, TOTALS, 0.0), None)
    checkpoints.finish()
    if rank == 0:
        (config.folder / "checkpoint-00000002").write_text("where a folder should be")
    dist.barrier()
    checkpoints.save(engine, Position(2, TOTALS, 0.0), None)
    with pytest.raises(
        CheckpointError, match=r"step 2 could not be written .*--train\.checkpoint-storage; .* step [01]"
    ):
        checkpoints.finish()
    assert CheckpointStore(config, LOCAL).steps() == [1]


def fails_for_a_while(rank: int, folder: Path) -> None:
    config = config_of(folder, dist.get_world_size(), 2, "back", checkpoint_patience=60.0)
    engine, checkpoints = engine_of(config), checkpoints_of(config)
    blocked = config.folder / "checkpoint-00000002"
    if rank == 0:
        blocked.write_text("where a folder should be")
    dist.barrier()
    checkpoints.save(engine, Position(2, TOTALS, 0.0), None)
    train_on(engine, config, range(1))  # goes on meanwhile
    assert checkpoints.poll() is None and checkpoints.writing
    dist.barrier()
    if rank == 0:
        blocked.unlink()
    assert checkpoints.finish() == 2
    assert CheckpointStore(config, LOCAL).steps() == [2]
    dist.barrier()
    assert [event["event"] for event in read_lines(config.folder / EVENTS)] == ["storage", "checkpoint"]


CASES = {
    case.__name__: case
    for case in (
        keeps_and_passes_over,
        does_not_blame_a_checkpoint_for_its_storage,
        misses_a_part,
        does_not_take_a_slow_storage_for_a_hang,
        fails_for_good,
        fails_for_a_while,
    )
}


def cases(rank: int, folder: str) -> None:
    """All cases in one group of processes: starting one takes longer than a case."""
    for name, case in CASES.items():
        try:
            case(rank, Path(folder))
        except Exception:
            Path(folder, f"{name}-{rank}").write_text(traceback.format_exc())
            raise
        Path(folder, f"{name}-{rank}").touch()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    with contextlib.suppress(ProcessRaisedException):
        run_workers(cases, 2, str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_files(files, case):
    assert [(files / f"{case}-{rank}").read_text() for rank in range(2)] == ["", ""]


def test_a_folder_without_its_description_is_no_checkpoint(tmp_path):
    store = CheckpointStore(config_of(tmp_path, 1, 2, "half"), LOCAL)
    store.write(7, "rank-00000.safetensors", b"x")
    assert store.steps() == []
    store.complete(7, {"loss": None})
    assert store.steps() == [7]
