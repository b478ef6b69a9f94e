"""Weights that a tower starts with."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from muser_dist.errors import CheckpointError

WEIGHTS = "model.safetensors"
"""File in an exported model's folder."""


def exported_weights(folder: str | Path) -> Path:
    """The weights of an exported model, which lie in its folder or in `model` of its run's.

    Raises:
        CheckpointError: there are none.
    """
    for path in (Path(folder) / WEIGHTS, Path(folder) / "model" / WEIGHTS):
        if path.is_file():
            return path
    raise CheckpointError(f"{folder}: no {WEIGHTS}; give the folder `model` that a finished run left behind")


def load_tower_weights(tower: nn.Module, path: str, modality: str) -> None:
    """Puts the weights of an exported model's tower in place of a tower's own.

    Args:
        tower: of the same sizes.
        path: folder of the exported model, or of its run.
        modality: whose tower it is, here and there.

    Raises:
        CheckpointError: there is no such file or tower, or sizes differ.
    """
    file, prefix = exported_weights(path), f"towers.{modality}."
    try:
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            there = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
            if not there:
                raise CheckpointError(f"model.{modality}.weights: {file} has no {modality} tower")
            tower.load_state_dict({name: weights.get_tensor(key) for name, key in there.items()})
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"model.{modality}.weights: those of {file} do not fit: {reason[:300]}; the tower's options and data "
            "settings must be that model's"
        ) from None
