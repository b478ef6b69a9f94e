"""CLaMP 2 (Wu et al. 2024, arXiv 2410.13267): scores and MIDI in one space with texts in many languages.

Stage "m3" pretrains the encoder of notation on masked patches, of ABC and MIDI alike; stage "align" goes on from it and
contrasts notation with texts. Of a piece that has both notations one is drawn, so texts are the bridge between the two.
`muser_symbolic` has notation beside MUSER's modalities instead, all in one loss.
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
from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.recipes.muser import Size, muser

ClampSize = Literal["tiny", "base"]

_XLM_R = "FacebookAI/xlm-roberta-base"

RAW = "{title} | {composer} | {genres} | {description} | {lyrics} | {tags} | {ensembles} | {instruments}"
"""Metadata as they are, by the names of CLaMP's JSONL."""

_SMALL = SymbolicConfig(max_patches=128)
"""Folk tunes as ABC fit into 64; of MIDI, which has two messages for each note, 128 are some ten seconds."""

_SMALL_M3: dict[str, Any] = {"width": 128, "depth": 3, "heads": 4}


def m3(size: ClampSize = "base") -> RunConfig:
    """The pretraining of M3, CLaMP 2's encoder of notation: a decoder writes 45 % of the patches again.

    "base" has the published sizes and optimizer: 512 patches of 64 characters, 12 layers of 768, a decoder of 3, AdamW
    at 1e-4 after 1000 steps of warm-up. "tiny" is for two cores. What is not as released: the batch of all workers
    together is 128 where one GPU had 16, learning rates fall to 0 with half a cosine, and a bar that a patch does not
    hold goes on in the next.
    """
    tiny = size == "tiny"
    options: dict[str, Any] = _SMALL_M3 | {"decoder_depth": 1} if tiny else {}
    return RunConfig(
        data=DataConfig(symbolic=_SMALL if tiny else SymbolicConfig()),
        model=ModelConfig(symbolic=TowerConfig("m3_pretraining", options)),
        objective=ObjectiveConfig("masked_patches", pairs=()),
        train=TrainConfig(
            samples=8_192 if tiny else 1 << 24,
            global_batch=32 if tiny else 128,
            chunk=16,
            warmup_samples=1_024 if tiny else 128_000,
            lr=1e-3 if tiny else 1e-4,
            weight_decay=0.01,
            cache_gradients=False,
        ),
    )


def clamp2(size: ClampSize = "base") -> Stages:
    """Both stages.

    "base" has the published sizes: M3, XLM-R's base with the mean of its 128 tokens, a linear layer of 768 behind
    each, dot products of embeddings as they are with the constant scale 1, 1024 rows in a batch, AdamW at 5e-5. Half of
    the texts are metadata, of which each line stays with probability 1/2, in any order; a quarter is `summary_en`, a
    quarter one of the languages of `summary`, an object {language: text}. XLM-R and its tokenizer come from the hub, or
    from a folder (--align.data.tokenizer, --align.model.text.options.model FOLDER, --align.model.text.weights FOLDER).

    "tiny" is for two cores: towers from random weights, and cosines with a learned temperature, which small embeddings
    that start at random need.

    What is not as released: rows whose texts state the same facts match; learning rates fall to 0; lines of metadata
    are joined by " | ", where the released code has the tokenizer's separator; of a text longer than its tokens the
    head is read, where that takes head, tail or a window at random.
    """
    tiny = size == "tiny"
    before = m3(size)
    align = RunConfig(
        data=replace(
            before.data,
            templates=("{caption}", "{type} | {tonic} {mode} | {meter} | {genre} | {tags}")
            if tiny
            else (RAW, RAW, "{summary_en}", "{summary}"),
            line_dropout=0.5,
            tokenizer="words" if tiny else _XLM_R,
            max_tokens=48 if tiny else 128,
        ),
        model=ModelConfig(
            symbolic=TowerConfig("m3", _SMALL_M3 if tiny else {}),
            text=TowerConfig("text", {"width": 128, "depth": 2, "heads": 4})
            if tiny
            else TowerConfig("hf_text", {"model": _XLM_R, "pooling": "mean"}, weights=_XLM_R),
            projection_dim=128 if tiny else 768,
        ),
        objective=ObjectiveConfig(
            pairs=(PairConfig("symbolic", "text"),),
            normalise=tiny,
            temperature=TemperatureConfig() if tiny else TemperatureConfig(init=1.0, learnable=False),
        ),
        train=TrainConfig(
            samples=65_536 if tiny else 1 << 24,
            global_batch=128 if tiny else 1024,
            warmup_samples=4_096 if tiny else 1_024_000,
            lr=1e-3 if tiny else 5e-5,
            weight_decay=0.05 if tiny else 0.01,
            cache_gradients=not tiny,
        ),
        evaluate=EvaluateConfig(fields=("type", "genre", "genres", "meter", "mode")),
    )
    return Stages((Stage("m3", before), Stage("align", align, "towers")))


def muser_symbolic(size: Size = "small") -> RunConfig:
    """`muser` with notation: audio, spectrogram, text, and ABC or MIDI, in one loss.

    Notation is contrasted with text, as the others are; and with both towers of sound, to which it says more than any
    text does, and nothing about the recording. A row that lacks one of them takes part in what it has.
    """
    config = muser(size)
    assert config.model.audio is not None
    pairs = (*config.objective.pairs, *(PairConfig("symbolic", other) for other in _OTHERS))
    return replace(
        config,
        data=replace(config.data, symbolic=_SMALL if size == "tiny" else SymbolicConfig()),
        # As large as the waveform's Transformer.
        model=replace(config.model, symbolic=TowerConfig("m3", dict(config.model.audio.options))),
        objective=replace(config.objective, pairs=pairs),
    )


_OTHERS: tuple[Literal["text", "audio", "spectrogram"], ...] = ("text", "audio", "spectrogram")
