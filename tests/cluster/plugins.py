"""Objectives that tests name in configs as `tests.cluster.plugins:...`; workers import them."""

import os
import signal
from pathlib import Path

import torch.distributed as dist

from muser_dist.objectives.contrastive import contrastive

ARMED = "MUSER_TEST_ARMED"
"""Environment variable with the folder whose files arm the objectives below."""

_calls = 0


def dies_once(features, logits, batch, config):
    """The contrastive objective; when armed, rank 1 disarms it and dies in its 11th step."""
    global _calls
    _calls += 1
    trigger = Path(os.environ[ARMED]) / "dies_once"
    if _calls == 11 and dist.get_rank() == 1 and trigger.exists():
        trigger.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return contrastive(features, logits, batch, config)
