"""A model of the size that people train on GPUs, for benchmarks: three towers of about a hundred million parameters.

No recipe for training: nothing of it was tuned. `--recipe base_size:base`.
"""

from muser_dist.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TowerConfig, TrainConfig


def base() -> RunConfig:
    """wav2vec 2.0's Transformer, ConvNeXt and BERT, each in its authors' "base" size, on crops of 10 s at 16 kHz."""
    return RunConfig(
        data=DataConfig(sample_rate=16_000, crop_seconds=10.0, vocabulary=30_522, max_tokens=64),
        model=ModelConfig(
            audio=TowerConfig("waveform", {"width": 768, "depth": 12, "heads": 12}),
            spectrogram=TowerConfig("spectrogram", {"model": "convnext_base"}),
            text=TowerConfig("text", {"width": 768, "depth": 12, "heads": 12}),
            projection_dim=512,
        ),
        objective=ObjectiveConfig(bf16=True),
        train=TrainConfig(precision="bf16", global_batch=1024, chunk=64, samples=1_048_576),
    )
