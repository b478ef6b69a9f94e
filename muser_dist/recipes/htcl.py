"""HTCL (Pan et al. 2025): what music means first, then what people like; one model that hears a song alone.

Stage "semantic" contrasts a song's sound with its text. Stage "preference" goes on from it with pairs of songs that
listeners like together (data.pairs, which jobs/mine_pairs.py makes of a log): L1 keeps the semantics of both songs, L2
brings their sounds together, L3 the sound of each to the fusion of sound and text of the other.
"""

from dataclasses import replace
from typing import Any, Literal

from muser_dist.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    PairConfig,
    RunConfig,
    Stage,
    Stages,
    TemperatureConfig,
    TowerConfig,
    TrainConfig,
)

SEMANTIC = (PairConfig("spectrogram", "text"),)
PREFERENCE = (*SEMANTIC, PairConfig("spectrogram", "partner"), PairConfig("spectrogram", "fused"))


def htcl(size: Literal["tiny", "base"] = "base") -> Stages:
    """Both stages.

    "base" has the published sizes: two minutes of 128 mel bands every 96 ms through 12 layers, multilingual BERT, heads
    of 384 and 192 units to 100 dimensions, temperatures that start at exp(-2.6). The sample rate is not published. BERT
    and its tokenizer come from the hub, or from a folder (--data.tokenizer, --model.text.options.model FOLDER).

    What is not as released: padding is not heard; the gradient of negatives on other workers counts; learning rates
    fall to 0 with half a cosine. And rows whose texts state the same facts match; where no text repeats, that changes
    nothing.

    "tiny" is for two cores, from random weights. Its first stage has linear heads, with which small towers hear more;
    the second leaves the towers as they are, so that new heads weigh what is heard by what is liked, and starts at
    temperatures of 0.5, since a pair of liked songs says far less than a text does (benchmarks/LOG.md, 2026-11-26).
    """
    tiny = size == "tiny"
    width, depth, heads, channels = (128, 2, 4, 128) if tiny else (768, 12, 12, 512)
    # 128 ms every 96 ms, of two minutes; a small model hears eight seconds in 20 ms steps.
    spectrogram = {"mels": 64, "window": 1024, "hop": 320} if tiny else {"mels": 128, "window": 2048, "hop": 1536}
    sound = TowerConfig(
        "htcl_audio", {"width": width, "depth": depth, "heads": heads, "channels": channels} | spectrogram, head_lr=1e-4
    )
    text = (
        TowerConfig("text", {"width": 128, "depth": 2, "heads": 4})
        if tiny
        else TowerConfig("hf_text", {"model": _BERT, "pooling": "cls"}, head_lr=1e-4)
    )
    semantic = RunConfig(
        data=DataConfig(
            sample_rate=16_000,
            crop_seconds=8.0 if tiny else 120.0,
            # Metadata, one after the other.
            templates=("{title}, {artist}, {genre}, {language}, {tags}", "{type}, {mode}, {meter}", "{caption}"),
            tokenizer="words" if tiny else _BERT,
            max_tokens=48 if tiny else 128,
        ),
        model=ModelConfig(
            spectrogram=replace(sound, lr=1e-4),
            text=replace(text, lr=1e-5),
            projection_dim=100,
            projection_hidden=(384, 192),
            projection_activation="relu",
        ),
        objective=ObjectiveConfig(
            pairs=SEMANTIC,
            # No bound is published: these are never reached.
            temperature=TemperatureConfig(init=0.0743, minimum=1e-4, maximum=1e4),
        ),
        train=TrainConfig(
            samples=32_768 if tiny else 1 << 23,
            global_batch=128 if tiny else 1024,
            warmup_samples=2_048 if tiny else 1 << 17,
            lr=1e-4,
            weight_decay=0.0,
            clip_norm=0.0,
            cache_gradients=not tiny,
        ),
        evaluate=EvaluateConfig(fields=("genre", "language", "instrument", "type", "meter", "mode")),
    )
    towers: dict[str, Any] = {
        name: replace(tower, lr=1e-5, weights="") for name, tower in semantic.model.towers().items()
    }
    preference = replace(
        semantic,
        model=replace(semantic.model, **towers),
        objective=replace(semantic.objective, pairs=PREFERENCE),
    )
    if tiny:
        towers = {name: replace(tower, lr=None, head_lr=None) for name, tower in towers.items()}
        frozen: dict[str, Any] = {name: replace(tower, freeze=True) for name, tower in towers.items()}
        train = replace(semantic.train, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, clip_norm=1.0)
        weak = replace(preference.objective.temperature, init=0.5)
        semantic = replace(semantic, model=replace(semantic.model, **towers, projection_hidden=()), train=train)
        preference = replace(
            preference,
            model=replace(preference.model, **frozen),
            objective=replace(preference.objective, temperature=weak),
            train=train,
        )
    return Stages((Stage("semantic", semantic), Stage("preference", preference, "towers")))


_BERT = "google-bert/bert-base-multilingual-uncased"
