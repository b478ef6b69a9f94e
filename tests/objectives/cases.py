"""Every loss of the family with its settings, and random global batches with everything that goes wrong in them."""

from typing import Any

import torch

from muser_dist.config import ObjectiveConfig, PairConfig, TemperatureConfig
from muser_dist.objectives.batch import Batch, Logits

MODALITIES = ("audio", "spectrogram", "text")
THREE_PAIRS = (PairConfig("audio", "spectrogram"), PairConfig("audio", "text"), PairConfig("spectrogram", "text"))
TWO_PAIRS = (PairConfig("audio", "text", 2.5), PairConfig("spectrogram", "text"))
SHARED = TemperatureConfig(shared=True)
VIEWS = (PairConfig("audio", "view"),)
SONGS = (PairConfig("audio", "text"), PairConfig("audio", "partner", 0.5), PairConfig("audio", "fused"))
LABELS = {"genre": 3, "tags": 2, "absent": 4}

LOSSES: dict[str, dict[str, Any]] = {
    "InfoNCE": {"targets": "instance"},
    "InfoNCE, same text": {"targets": "same_text"},
    "supervised contrastive": {"targets": "same_label"},
    "false negatives left out": {"targets": "instance", "exclude_same_text": True},
    "own hard negatives": {"targets": "same_text", "hard": 3},
    "decoupled": {"name": "decoupled", "targets": "instance"},
    "decoupled, same text": {"name": "decoupled", "targets": "same_text", "hard": 2},
    "debiased": {"name": "debiased", "targets": "instance", "options": {"tau_plus": 0.1}},
    "importance-weighted": {"name": "debiased", "targets": "instance", "options": {"beta": 0.5}},
    "similarity-weighted": {"name": "similarity_weighted", "targets": "instance", "options": {"kappa": 0.3}},
    "sigmoid": {"name": "sigmoid", "targets": "instance", "bias": -10.0},
    "sigmoid, same text": {"name": "sigmoid", "targets": "same_text", "bias": -3.0},
    "MUSER, poster": {"name": "muser_poster", "targets": "instance"},
    "MUSER, Algorithm 1": {"targets": "instance", "temperature": SHARED, "pairs": THREE_PAIRS[1:]},
    "MUSER, code": {"name": "muser_code", "targets": "instance", "pairs": THREE_PAIRS},
    "CLaMP, not normalised": {"targets": "instance", "normalise": False, "scale": 1.0},
    "Matryoshka": {"targets": "same_text", "dims": (4, 8, 16)},
    "three pairs": {"targets": "same_text", "pairs": THREE_PAIRS},
    "NT-Xent": {"targets": "instance", "pairs": VIEWS},
    "MusCALL, two views beside texts": {"pairs": (PairConfig("audio", "text"), PairConfig("view", "audio", 0.3))},
    "decoupled, two views": {"name": "decoupled", "pairs": VIEWS, "dims": (8, 16)},
    "debiased, two views": {
        "name": "debiased",
        "targets": "instance",
        "pairs": VIEWS,
        "options": {"tau_plus": 0.1, "beta": 0.5},
    },
    "HTCL, songs that are liked together": {"targets": "instance", "pairs": SONGS},
    "HTCL, other liked songs left out": {"pairs": SONGS[1:], "exclude_liked": True},
    "HTCL, one embedding against the other": {"name": "decoupled", "pairs": SONGS[1:2], "dims": (8, 16)},
    "classes and tags": {"name": "supervised", "pairs": ()},
    "scale 100": {"targets": "same_text", "scale": 100.0},
    "bfloat16": {"targets": "same_text", "bf16": True, "normalise": False, "pairs": THREE_PAIRS},
}
"""By name: fields of ObjectiveConfig, the number of "hard" negatives of each row, and the "scale"."""


def config_of(name: str, **changes: Any) -> ObjectiveConfig:
    fields = {"pairs": TWO_PAIRS} | {k: v for k, v in LOSSES[name].items() if k not in ("hard", "scale")}
    return ObjectiveConfig(**(fields | changes))


class Case:
    """A global batch in float64, out of float32 numbers: masked rows, missing modalities, repeats.

    Args:
        name: of LOSSES.
        rows: N; of pairs of songs one more where it is odd.
        seed: of everything random.
        repeats: whether clips come twice; without, every row is valid too.
    """

    def __init__(self, name: str, rows: int, seed: int = 0, repeats: bool = True, dim: int = 16) -> None:
        g = torch.Generator().manual_seed(seed)
        self.config = config_of(name)
        hard = LOSSES[name].get("hard", 0)
        songs = any(pair.of_songs for pair in self.config.pairs)
        rows += songs and rows % 2
        views = ("view",) if any("view" in (pair.first, pair.second) for pair in self.config.pairs) else ()
        self.features = {m: torch.randn(rows, dim, generator=g) for m in (*MODALITIES, *views)}
        if self.config.bf16:  # what bfloat16 holds as it is: so there is nothing to round, and the result is exact
            self.features = {m: (x / 4).bfloat16().float() for m, x in self.features.items()}
        valid = {m: (torch.rand(rows, generator=g) < 0.8) | (not repeats) for m in self.features}
        row = torch.randint(0, max(1, rows - 2), (rows,), generator=g) if repeats else torch.arange(rows)
        text_id = torch.randint(0, 4, (rows,), generator=g).masked_fill_(~valid["text"], -1)
        label_id = torch.randint(-1, 3, (rows,), generator=g)
        negatives = {}
        if hard:
            self.features["text_negatives"] = torch.randn(rows, hard, dim, generator=g)
            negatives["text"] = torch.rand(rows, hard, generator=g) < 0.6
        labels = {}
        if self.config.name == "supervised":
            self.features |= {f"label/{name}": torch.randn(rows, n, generator=g) for name, n in LABELS.items()}
            labels["genre"] = torch.randint(-1, LABELS["genre"], (rows,), generator=g)
            labels["tags"] = torch.randint(0, 2, (rows, LABELS["tags"]), generator=g).to(torch.int8)
            labels["tags"][torch.rand(rows, generator=g) < 0.3] = -1
            labels["absent"] = torch.full((rows,), -1)
        liked = None
        if songs:
            self.features["fused"] = torch.randn(rows, dim, generator=g)
            liked = torch.randint(-1, rows, (rows, 3), generator=g) if self.config.exclude_liked else None
        pairs = len(self.config.pairs)
        self.batch = Batch(valid, row, text_id, label_id, negatives, labels, liked)
        scale = LOSSES[name].get("scale")
        self.scale = torch.full((pairs,), scale) if scale else torch.tensor([3.0, 11.0, 7.0])[:pairs]
        if self.config.temperature.shared:
            self.scale[:] = self.scale[0]
        self.bias = None if self.config.bias is None else torch.full((pairs,), self.config.bias)

    def part(self, where: slice, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], Logits, Batch]:
        """These rows as one rank has them, with leaves that collect gradients."""
        leaf = {name: x[where].to(dtype, copy=True).requires_grad_() for name, x in self.features.items()}
        bias = None if self.bias is None else self.bias.to(dtype).clone().requires_grad_()
        logits = Logits(self.scale.to(dtype).clone().requires_grad_(), bias)
        b = self.batch
        batch = Batch(
            {name: flag[where] for name, flag in b.valid.items()},
            b.row[where],
            b.text_id[where],
            b.label_id[where],
            {name: flag[where] for name, flag in b.negatives.items()},
            {name: label[where] for name, label in b.labels.items()},
            None if b.liked is None else b.liked[where],
        )
        return leaf, logits, batch

    @property
    def rows(self) -> int:
        return len(self.batch.row)


def gradients(features: dict[str, torch.Tensor], logits: Logits) -> dict[str, torch.Tensor]:
    """What the leaves have collected, by name; zeros where nothing came."""
    leaves = features | {"scale": logits.scale} | ({} if logits.bias is None else {"bias": logits.bias})
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
