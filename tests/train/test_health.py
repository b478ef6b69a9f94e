"""Numbers of the global batch are the same on any number of ranks, and those of their definitions in float64."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from muser_dist.config import PairConfig
from muser_dist.objectives.batch import Batch
from muser_dist.train.health import batch_health
from tests.distributed.workers import run_workers

ROWS, DIMS = 24, 6
PAIRS = (PairConfig("audio", "text"), PairConfig("spectrogram", "text"))


def global_batch(seed: int = 0) -> tuple[dict[str, torch.Tensor], Batch]:
    """Rows of which some lack a modality, and a last third that pads: a whole rank's, of three."""
    generator = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(ROWS, DIMS, generator=generator) for name in ("audio", "spectrogram", "text")}
    features["audio"] = 3 * features["text"] + 0.5 * features["audio"]
    features["spectrogram"] = 1 + 1e-3 * features["spectrogram"]  # nearly a point
    features["text"][:, 4:] = 0.0
    valid = {name: torch.rand(ROWS, generator=generator) < 0.8 for name in features}
    for name in features:
        valid[name][16:] = False
        features[name][~valid[name]] = float("nan")  # whatever a tower makes of what is no row
    ids = torch.randint(0, 9, (ROWS,), generator=generator)
    ids[~valid["text"]] = -1
    return features, Batch(valid, torch.arange(ROWS), ids, ids)


def part(features: dict[str, torch.Tensor], batch: Batch, rows: slice) -> tuple[dict[str, torch.Tensor], Batch]:
    valid = {name: flags[rows] for name, flags in batch.valid.items()}
    ids = batch.text_id[rows]
    return {name: x[rows] for name, x in features.items()}, Batch(valid, batch.row[rows], ids, ids)


def by_definition(features: dict[str, torch.Tensor], batch: Batch) -> dict[str, float]:
    health = {}
    rows = {name: batch.valid[name].numpy() for name in features}
    unit = {
        name: x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1)[:, None] for name, x in features.items()
    }
    for name, flags in rows.items():
        health[f"valid_rows/{name}"] = flags.sum()
        covariance = np.cov(unit[name][flags].T, bias=True)
        eigenvalues = np.linalg.eigvalsh(covariance)
        health[f"variance/{name}"] = unit[name][flags].var(axis=0).mean()
        health[f"dimensions/{name}"] = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    for pair in PAIRS:
        both = rows[pair.first] & rows[pair.second]
        difference = unit[pair.first][both] - unit[pair.second][both]
        health[f"alignment/{pair.first}-{pair.second}"] = (difference**2).sum(axis=1).mean()
    ids = batch.text_id[batch.valid["text"]].tolist()
    twice = {i for i, j in combinations(range(len(ids)), 2) if ids[i] == ids[j]}
    twice |= {j for i, j in combinations(range(len(ids)), 2) if ids[i] == ids[j]}
    return health | {"duplicates": len(twice) / len(ids)}


def worker(rank: int, world: int, folder: str) -> None:
    features, batch = global_batch()
    each = ROWS // world
    health = batch_health(*part(features, batch, slice(rank * each, (rank + 1) * each)), PAIRS)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(health, file)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_ranks_finds_what_the_definitions_say(world, tmp_path):
    if world == 1:
        worker(0, 1, str(tmp_path))  # without any process group
    else:
        run_workers(worker, world, world, str(tmp_path))
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(health == of_ranks[0] for health in of_ranks)
    want = by_definition(*global_batch())
    assert of_ranks[0] == pytest.approx(want, rel=1e-3)  # of a cloud a thousandth wide, float32 leaves four digits
    assert {k: v for k, v in of_ranks[0].items() if "spectrogram" not in k} == pytest.approx(
        {k: v for k, v in want.items() if "spectrogram" not in k}, rel=1e-6
    )
    assert 0 < want["duplicates"] < 1 and want["variance/spectrogram"] < 1e-6 < want["variance/audio"]


def test_an_even_spread_and_collapse():
    rows = torch.cat([torch.eye(8), -torch.eye(8)])
    flags, ids = torch.ones(16, dtype=torch.bool), torch.arange(16)
    batch = Batch({"audio": flags, "text": flags}, ids, ids, ids)
    health = batch_health({"audio": 5 * rows, "text": rows[:1].expand(16, 8)}, batch, PAIRS[:1])
    assert health["variance/audio"] == pytest.approx(1 / 8) and health["dimensions/audio"] == pytest.approx(8)
    assert health["variance/text"] == pytest.approx(0, abs=1e-12)
    assert health["alignment/audio-text"] == pytest.approx(2) and health["duplicates"] == 0


def test_without_valid_rows_there_is_nothing_to_say():
    flags, ids = torch.zeros(4, dtype=torch.bool), torch.full((4,), -1)
    batch = Batch({"audio": flags, "text": flags}, ids, ids, ids)
    features = {name: torch.full((4, 3), float("nan")) for name in ("audio", "text")}
    assert batch_health(features, batch, PAIRS[:1]) == {"valid_rows/audio": 0, "valid_rows/text": 0}
