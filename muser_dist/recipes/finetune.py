"""Fine-tuning: one tower of a pretrained model, or of a recipe, learns metadata fields as classes or tags."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from muser_dist.config import (
    EvaluateConfig,
    Modality,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TowerConfig,
    TrainConfig,
)
from muser_dist.errors import ConfigError
from muser_dist.muser import exported_config
from muser_dist.recipes import load_recipe

TOWER_LR = 1e-4
"""Peak learning rate of a pretrained tower: a tenth of its new head's."""

_OF_PRETRAINING = ("selected", "corrupt", "decoder_depth")
"""Options of m3_pretraining that are none of m3."""


def finetune(start: str, tower: str | None = None) -> RunConfig:
    """A config that fine-tunes; data.classes and data.tags are yet to be named.

    Data settings and the tower are those of where it starts; batch, length and learning rates are what small labelled
    corpora want.

    Args:
        start: folder of a run or of its exported model; or a recipe, whose tower starts from random weights.
        tower: "audio", "spectrogram", "symbolic", "features" or "text"; by default the first of them that there is.

    Raises:
        ConfigError: there is no such recipe or tower.
        CheckpointError: the folder holds no model.
    """
    pretrained = Path(start).is_dir()
    config = exported_config(Path(start)) if pretrained else load_recipe(start)
    towers = config.model.towers()
    if not pretrained and config.objective.name == "supervised" and tower in (None, *towers):
        return config
    name: Modality = next((name for name in towers if tower in (None, name)), "audio")
    if tower not in (None, name) or name not in towers:
        raise ConfigError(f"--tower {tower}: {start} has {', '.join(towers)}")
    kept: TowerConfig = replace(
        towers[name],
        weights=start if pretrained else "",
        lr=TOWER_LR if pretrained else None,
        freeze=False,
        freeze_head=False,
        cache_rows=0,
    )
    if kept.build == "m3_pretraining":  # its decoder stays behind; weights of m3 have the same names
        options = {option: value for option, value in kept.options.items() if option not in _OF_PRETRAINING}
        kept = replace(kept, build="m3", options=options)
    model: dict[str, Any] = {name: kept}
    before = config.train
    return replace(
        config,
        name="",
        storage="runs",
        data=replace(config.data, classes=(), tags=(), label_values={}, label="", train_share=1.0),
        model=ModelConfig(**model),
        objective=ObjectiveConfig("supervised", pairs=()),
        train=TrainConfig(
            workers=before.workers,
            gpu=before.gpu,
            cpus_per_worker=before.cpus_per_worker,
            resource=before.resource,
            precision=before.precision,
            samples=16_384,
            global_batch=64,
            chunk=32,
            warmup_samples=1_024,
            checkpoint_samples=4_096,
        ),
        evaluate=EvaluateConfig(),
    )
