"""MUSER's published recipes with towers and crops that a test can train: all else is theirs."""

from dataclasses import replace

from muser_dist.config import RunConfig
from muser_dist.recipes import load_recipe


def shrunk(recipe: str) -> RunConfig:
    """The same towers, smaller; words in place of the tokenizer that is fetched by name."""
    config = load_recipe(recipe)
    assert config.model.audio and config.model.spectrogram and config.model.text
    audio = {"outputs": 16, "model": "resnet10t", "n_fft": 128, "hop": 50, "window": 100}
    spectrogram = config.model.spectrogram.options | {"model": "resnet10t", "outputs": 16}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = config.model.text.options | {"model": config.model.text.options["model"] | sizes, "projection": 16}
    return replace(
        config,
        data=replace(config.data, sample_rate=8_000, crop_seconds=0.5, tokenizer="words"),
        model=replace(
            config.model,
            audio=replace(config.model.audio, options=audio),
            spectrogram=replace(config.model.spectrogram, options=spectrogram),
            text=replace(config.model.text, options=text),
            projection_dim=16,
        ),
    )


def muser_paper() -> RunConfig:
    """A recipe."""
    return shrunk("muser_paper")


def muser_code() -> RunConfig:
    """A recipe."""
    return shrunk("muser_code")
