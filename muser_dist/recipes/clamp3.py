"""CLaMP 3 (Wu et al. 2025, arXiv 2502.10362): scores, MIDI and sound that never meet, each aligned with texts.

After "m3" four stages follow, with text as the bridge. "symbolic" is CLaMP 2's alignment of notation with texts.
"audio" aligns sound with the texts, which stay as they are: a Transformer over a frozen network's features of windows
(modality `features`; jobs/embed.py --features makes them). "joint" trains text along with it, which moves text away
from notation; "repair" lets notation follow. What a stage does not train is frozen with its head, so it comes through
to the bit, in each stage's model.
"""

from dataclasses import replace
from typing import Any

from muser_dist.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    PairConfig,
    RunConfig,
    Stage,
    Stages,
    TowerConfig,
)
from muser_dist.data.config import FeaturesConfig
from muser_dist.recipes.clamp import ClampSize, clamp2

RAW = (
    "{title} | {artists} | {region} | {language} | {genres} | {tags} | {background} | {analysis} | {description} | "
    "{scene}"
)
"""Metadata as they are, by the names of M4-RAG's JSON."""

_KEPT: dict[str, Any] = {"freeze": True, "freeze_head": True}


def clamp3(size: ClampSize = "base") -> Stages:
    """All five stages.

    "base" has the published sizes: those of `clamp2`, and 12 layers of 768 over 126 windows of 5 s between two zero
    vectors, with 1024 rows in a batch at 5e-5 for notation and 2048 at 1e-5 for sound. Half of the texts are metadata,
    half one of the languages of `translations`, here an object {language: text} with a line for each of the texts that
    M4-RAG has; of both each line stays with probability 1/2. Rows need what their stage reads: with scores and
    recordings of different pieces give --symbolic.data.train and --repair.data.train one corpus, and --audio.data.train
    and --joint.data.train the other.

    "tiny" is for two cores, and for features of a tower of 128 channels.

    What is not as released: as of `clamp2`; the length of stages, which is not published; and of features a run of
    windows at any place is taken, where the released code takes head, tail or a random place.
    """
    tiny = size == "tiny"
    m3, align = clamp2(size).stages
    data = replace(align.config.data, features=FeaturesConfig(128, 24) if tiny else FeaturesConfig())
    symbolic = replace(align.config, data=data if tiny else replace(data, templates=(RAW, "{translations}")))
    towers = symbolic.model
    assert towers.symbolic is not None and towers.text is not None
    text = replace(towers.text, weights="")  # from here on that of the stage before
    features = TowerConfig("features", {"width": 128, "depth": 2, "heads": 4} if tiny else {})
    train = symbolic.train

    def aligned(modality: str, samples: int, lr: float, **trained: TowerConfig) -> RunConfig:
        """A stage that trains these towers on pairs of a modality with text, and keeps the others."""
        every = {"symbolic": towers.symbolic, "features": features, "text": text}
        kept: dict[str, Any] = {name: replace(tower, **_KEPT) for name, tower in every.items() if tower is not None}
        sound = modality == "features"
        batch = 2 * train.global_batch if sound and not tiny else train.global_batch
        return replace(
            symbolic,
            model=replace(towers, **(kept | trained)),
            objective=replace(symbolic.objective, pairs=(PairConfig(modality, "text"),)),  # type: ignore[arg-type]
            train=replace(
                train,
                samples=samples,
                global_batch=batch,
                lr=lr,
                warmup_samples=train.warmup_samples // 2 if tiny else 1_000 * batch,
            ),
        )

    more = train.samples // 2
    return Stages(
        (
            m3,
            Stage("symbolic", symbolic, "towers"),
            Stage("audio", aligned("features", train.samples, 1e-3 if tiny else 1e-5, features=features)),
            Stage("joint", aligned("features", more, 3e-4 if tiny else 1e-5, features=features, text=text)),
            Stage("repair", aligned("symbolic", more, 3e-4 if tiny else 5e-5, symbolic=towers.symbolic)),
        )
    )


def mert(weights: str = "m-a-p/MERT-v1-95M") -> RunConfig:
    """MERT (Li et al. 2023) as CLaMP 3 hears with it: windows of 5 s at 24 kHz, the mean over all layers and frames.

    Nothing is trained: a model of it, saved, is what jobs/embed.py --features takes (docs/clamp.md).

    Args:
        weights: a folder of Hugging Face's, or a name there.
    """
    tower = TowerConfig("hf_waveform", {"model": {"model_type": "hubert"}, "layers": "mean"}, weights=weights)
    return RunConfig(
        data=DataConfig(sample_rate=24_000, crop_seconds=5.0),
        model=ModelConfig(audio=tower),
        objective=ObjectiveConfig("supervised", pairs=()),
    )
