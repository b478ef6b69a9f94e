"""tiny: the whole system at a size that two CPU cores train in minutes.

MUSER's arrangement (waveform against text, spectrogram against text, one joint space) with
towers of about 1, 2 and 3 million parameters. It is what the demo and the tests run, and a
starting point for a recipe of your own.
"""

from muser_dist.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TowerConfig,
    TrainConfig,
)


def tiny() -> RunConfig:
    """The tiny recipe; its fields are documented in muser_dist/config.py."""
    return RunConfig(
        data=DataConfig(
            sample_rate=16_000,
            crop_seconds=5.0,
            # Facts that can be heard, in MUSER's manner; each field may be missing. The first
            # template is the one that evaluation uses.
            templates=(
                "A song of {type}, played on the {instrument}, at a {pace} pace, in {meter} time, in a {mode} key",
                "{instrument}, {type}, {mode}, {meter}, {pace}",
                "{caption}",
            ),
        ),
        model=ModelConfig(
            audio=TowerConfig("waveform", {"width": 128, "depth": 2, "heads": 4}),
            spectrogram=TowerConfig("spectrogram", {"depths": [2, 2, 4, 2], "dims": [32, 64, 128, 256]}),
            text=TowerConfig("text", {"width": 128, "depth": 2, "heads": 4}),
            projection_dim=128,
        ),
        objective=ObjectiveConfig(),
        train=TrainConfig(cache_gradients=False),  # its activations are small
        evaluate=EvaluateConfig(fields=("instrument", "type", "meter", "mode", "pace")),
    )
