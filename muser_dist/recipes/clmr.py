"""clmr: SimCLR on waveforms (CLMR, Spijkervet and Burgoyne 2021), the self-supervised baseline: no text is needed.

Two crops of each clip, drawn and augmented apart, go through one tower and one projection, and find each other among
all others by NT-Xent at temperature 0.5. Of the published augmentations this has polarity, gain, a filter and noise;
delay, change of pitch and reverberation are left out. The tower is tiny's in place of SampleCNN.
"""

from muser_dist.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    PairConfig,
    RunConfig,
    TemperatureConfig,
    TowerConfig,
    TrainConfig,
)
from muser_dist.data.config import AugmentConfig


def clmr() -> RunConfig:
    """The recipe; its fields are documented in muser_dist/config.py."""
    return RunConfig(
        data=DataConfig(
            sample_rate=16_000,
            crop_seconds=3.0,  # as published: 59,049 samples at 22.05 kHz are 2.7 s
            augment=AugmentConfig(
                polarity=0.8,
                gain=0.3,
                gain_db=(-6.0, 0.0),
                low_pass=0.4,
                low_pass_hz=(2200.0, 4000.0),
                noise=0.01,
            ),
        ),
        model=ModelConfig(
            audio=TowerConfig("waveform", {"width": 128, "depth": 2, "heads": 4}),
            projection_hidden=128,
            projection_dim=64,
        ),
        objective=ObjectiveConfig(
            pairs=(PairConfig("audio", "view"),),
            targets="instance",
            temperature=TemperatureConfig(init=0.5, learnable=False),
        ),
        train=TrainConfig(cache_gradients=False),
    )
