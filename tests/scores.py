"""Shards with notation, and a small config with a tower that reads it."""

from dataclasses import replace
from pathlib import Path

from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig, RunConfig, TemperatureConfig, TowerConfig
from muser_dist.data.symbolic.config import SymbolicConfig
from tests.data.symbolic.notation import melody
from tests.shardmaker import sample, write_shard
from tests.small import small_config

M3 = TowerConfig("m3", {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0})
TEXT = ("symbolic", "text")
NOTATION = ("symbolic", "notation")


def abc(index: int) -> bytes:
    """A tune of a few bars, which the index decides."""
    notes = [("CDEFGAB" * 2)[index * step % 14] for step in (1, 2, 3, 5)]
    bars = "|".join(f"{n}2 {n}z {n}4" for n in notes)
    return f"X:1\nT:Tune {index}\nM:4/4\nL:1/8\nK:{'CGDF'[index % 4]}\n{bars}|]\n".encode()


def midi(index: int) -> bytes:
    """A melody that the index decides."""
    return melody(*(60 + index * step % 12 for step in (1, 2, 3, 5)), program=index % 128)


def piece(index: int, *extensions: str) -> dict[str, bytes]:
    """Metadata with members of these kinds: abc, mid, flac."""
    made = {"abc": abc(index), "mid": midi(index)} | sample(index)
    return {name: made[name] for name in (*extensions, "json")}


def write_scores(folder: Path, rows: int, *extensions: str, name: str = "train") -> str:
    """Shards of up to 8 rows with these members, ABC and MIDI by default; returns a pattern for all of them."""
    members = extensions or ("abc", "mid")
    for first in range(0, rows, 8):
        numbers = range(first, min(rows, first + 8))
        write_shard(folder / f"{name}-{first:05d}.tar", [(f"piece{i:05d}", piece(i, *members)) for i in numbers])
    return f"{folder}/{name}-*.tar"


def symbolic_config(*pairs: tuple[str, str], train: dict | None = None, **symbolic) -> RunConfig:
    """The small config with notation and text, and whatever towers its pairs need besides."""
    small = small_config(train=train)
    contrasts = tuple(PairConfig(*pair) for pair in pairs or (TEXT,))  # type: ignore[arg-type]
    needed = {name for pair in contrasts for name in pair.towers}
    towers = {**small.model.towers(), "symbolic": M3}
    return replace(
        small,
        data=replace(small.data, symbolic=SymbolicConfig(**({"max_patches": 24} | symbolic))),
        model=ModelConfig(projection_dim=8, **{name: towers[name] for name in towers if name in needed}),
        objective=ObjectiveConfig(pairs=contrasts, temperature=TemperatureConfig(init=0.2)),
    )
