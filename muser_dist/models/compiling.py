"""torch.compile of towers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from muser_dist.errors import ConfigError


def compile_tower(tower: nn.Module) -> None:
    """From its next call on the tower is compiled, for the shapes it is called with; names of weights stay.

    Random numbers are the ones that the tower draws without: the two passes over a chunk, without and with
    gradient, are compiled apart from each other and must drop out the same units.
    """
    tower.compile(dynamic=False, options={"fallback_random": True})


@contextmanager
def compiled(modality: str) -> Iterator[None]:
    """Around calls of a compiled tower: torch.compile does its work, and fails, when the tower is called.

    Raises:
        ConfigError: the tower cannot be compiled, or not on this machine.
    """
    from torch._dynamo.exc import TorchDynamoException  # torch imports it when something is compiled

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.{modality}.compile: torch.compile failed ({reason}); on CPUs it needs a C++ compiler and Python's "
            f"headers, on GPUs Triton. Install them, or leave --model.{modality}.compile out"
        ) from error
