"""MUSER (Chen et al. 2022): music, its spectrogram and texts made of metadata in one space.

Its poster, its Algorithm 1 and its released code disagree (docs/towers.md, objectives/muser.py). `muser_paper` and
`muser_code` are the latter two to the letter; `muser` is what we take from it, with modern towers of four sizes.
"""

from dataclasses import dataclass, replace
from typing import Literal

from muser_dist.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    PairConfig,
    RunConfig,
    TemperatureConfig,
    TowerConfig,
    TrainConfig,
)
from muser_dist.data.config import AugmentConfig

Size = Literal["tiny", "small", "base", "large"]


@dataclass(frozen=True)
class _Sizes:
    """Transformers of audio and text as (width, depth, heads), the ConvNeXt, and what goes with them."""

    audio: tuple[int, int, int]
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    text: tuple[int, int, int]
    projection_dim: int
    mels: int
    crop_seconds: float
    global_batch: int
    samples: int
    lr: float


_SIZES: dict[Size, _Sizes] = {
    "tiny": _Sizes((128, 2, 4), (2, 2, 4, 2), (32, 64, 128, 256), (128, 2, 4), 128, 64, 5.0, 128, 32_768, 1e-3),
    "small": _Sizes((256, 4, 4), (2, 2, 6, 2), (48, 96, 192, 384), (256, 4, 4), 256, 64, 10.0, 256, 1 << 18, 1e-3),
    # ConvNeXt-T beside Transformers of BERT's and CLIP's base size.
    "base": _Sizes((768, 12, 12), (3, 3, 9, 3), (96, 192, 384, 768), (512, 12, 8), 512, 128, 10.0, 1024, 1 << 23, 5e-4),
    # ConvNeXt-B beside wav2vec 2.0's large size.
    "large": _Sizes(
        (1024, 24, 16), (3, 3, 27, 3), (128, 256, 512, 1024), (768, 12, 12), 768, 128, 10.0, 4096, 1 << 25, 3e-4
    ),
}


def muser(size: Size = "small") -> RunConfig:
    """Our best reading: the paper's two pairs, over the full band, and texts that repeat are no negatives.

    - The spectrogram is log-mel over the full band and the whole crop, where the released code shows 1 to 7 kHz of
      its middle.
    - Rows whose texts state the same facts match (same_text): with ten genres a row has as many "negatives" of exactly
      its own text as a tenth of the batch.
    - Audio and spectrogram are not contrasted with each other: both come from the same crop, so details of the
      recording that no text mentions would tell the right one.
    """
    of = _SIZES[size]

    def transformer(sizes: tuple[int, int, int]) -> dict[str, int]:
        return dict(zip(("width", "depth", "heads"), sizes, strict=True))

    return RunConfig(
        data=DataConfig(
            sample_rate=16_000,
            crop_seconds=of.crop_seconds,
            # Facts that can be heard; each may be missing. The first template is the one that evaluation uses.
            templates=(
                "A song of {genre}, belongs to {tags}, whose style is {mood}, played on the {instrument}",
                "{genre}, {tags}, {mood}, {instrument}",
                "{caption}",
            ),
        ),
        model=ModelConfig(
            audio=TowerConfig("waveform", transformer(of.audio)),
            spectrogram=TowerConfig("spectrogram", {"depths": list(of.depths), "dims": list(of.dims), "mels": of.mels}),
            text=TowerConfig("text", transformer(of.text)),
            projection_dim=of.projection_dim,
        ),
        objective=ObjectiveConfig(targets="same_text"),
        train=TrainConfig(
            samples=of.samples,
            global_batch=of.global_batch,
            warmup_samples=of.samples // 8,
            lr=of.lr,
            checkpoint_samples=max(8_192, of.samples // 64),
            cache_gradients=size != "tiny",  # whose activations are small
        ),
        evaluate=EvaluateConfig(fields=("genre", "tags", "mood", "instrument")),
    )


def muser_audio_text(size: Size = "small") -> RunConfig:
    """`muser` without the spectrogram."""
    config = muser(size)
    return replace(
        config,
        model=replace(config.model, spectrogram=None),
        objective=replace(config.objective, pairs=(PairConfig("audio", "text"),)),
    )


def muser_paper() -> RunConfig:
    """Algorithm 1 to the letter: the mean of the cross-entropies of AT, TA, ST and TS, logits times one learned e^tau.

    Each row's right answer is itself (Y_i, the index). What the paper leaves open, towers, optimizer and picture among
    it, is the released code's; so the audio tower's loss on its wavelets is added here too.
    """
    config = muser_code()
    return replace(
        config,
        data=replace(
            config.data,
            # The poster's, and that of figure 1.
            templates=(
                "A song of {genre}, belongs to {tags}, whose style is {mood}",
                "The song titled {title}, belongs to {genre}, written by {artist}",
            ),
            augment=AugmentConfig(),
        ),
        objective=ObjectiveConfig(
            pairs=(PairConfig("audio", "text"), PairConfig("spectrogram", "text")),
            targets="instance",
            # No bound is mentioned: these are never reached.
            temperature=TemperatureConfig(init=0.07, minimum=1e-4, maximum=1e4, shared=True),
        ),
    )


def muser_code() -> RunConfig:
    """As released: AudioCLIP's three pairs, divided by 1·2·3, and the picture of 1 to 7 kHz, for MagnaTagATune.

    The towers are AudioCLIP's, with CLIP's image network on the spectrogram, each with its own projection; their
    published weights come with --model.NAME.weights. What is not as released: negatives are those of the global batch
    on any number of workers, crops of longer clips are random, and the wavelets' gradients are not divided by
    their largest (docs/decisions.md). data.tokenizer is CLIP's own, which transformers fetches by name.
    """
    passes, rows = 20, 15_244  # of the training set
    return RunConfig(
        data=DataConfig(
            sample_rate=16_000,
            crop_seconds=30.0,
            templates=("the music is characterized by {tags}", "The song belongs to {genre}"),
            augment=AugmentConfig(
                noise=0.5,
                noise_snr_db=(5.0, 20.0),
                gain=0.5,
                gain_db=(-5.0, 5.0),
                low_pass=0.5,
                low_pass_hz=(400.0, 1000.0),
            ),
            tokenizer="openai/clip-vit-base-patch32",
            vocabulary=49_408,
            max_tokens=77,
        ),
        model=ModelConfig(
            audio=TowerConfig("esresnext_fbsp", {"outputs": 1024}, head=False, checkpoint_activations=True),
            spectrogram=TowerConfig(
                "spectrogram",
                {"model": "resnet50_clip", "outputs": 1024, "kind": "cropped_linear", "window": 1024, "hop": 512},
                head=False,
            ),
            text=TowerConfig(
                "hf_text",
                {
                    "model": {
                        "model_type": "clip_text_model",
                        "vocab_size": 49_408,
                        "hidden_size": 512,
                        "intermediate_size": 2048,
                        "num_hidden_layers": 12,
                        "num_attention_heads": 8,
                        "max_position_embeddings": 77,
                        "hidden_act": "quick_gelu",
                    },
                    "pooling": "eos",
                    "projection": 1024,
                },
                head=False,
            ),
            projection_dim=1024,
        ),
        objective=ObjectiveConfig(
            name="muser_code",
            pairs=(
                PairConfig("audio", "spectrogram"),
                PairConfig("audio", "text"),
                PairConfig("spectrogram", "text"),
            ),
            targets="instance",
            temperature=TemperatureConfig(init=0.01, minimum=0.01, maximum=1.0),  # 100, within 1 and 100
        ),
        train=TrainConfig(
            workers=1,
            optimizer="sgd",
            lr=2e-5,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            clip_norm=0.0,
            samples=passes * rows,
            warmup_samples=5 * rows,
            global_batch=32,
            chunk=32,  # batch norms see the batch of one process
        ),
        evaluate=EvaluateConfig(fields=("tags", "genre")),
    )
