"""muser_audio_only: the audio tower with a head for each metadata field, MUSER's "AE only" and multi-task baseline.

What the other recipes learn from sentences over the metadata, this one learns from the fields themselves: one tower
that all fields share, a linear layer for each, the mean of their cross-entropies (Chen et al. 2022, poster, table 2).
"""

from muser_dist.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TowerConfig, TrainConfig


def muser_audio_only() -> RunConfig:
    """The recipe; its fields are documented in muser_dist/config.py."""
    return RunConfig(
        data=DataConfig(
            sample_rate=16_000,
            crop_seconds=5.0,
            classes=("instrument", "type", "meter", "mode", "pace"),
        ),
        model=ModelConfig(audio=TowerConfig("waveform", {"width": 128, "depth": 2, "heads": 4})),
        objective=ObjectiveConfig("supervised", pairs=()),
        train=TrainConfig(cache_gradients=False),
    )
