"""Ray for jobs that start and end with it."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
import ray.exceptions

from muser_dist.errors import ClusterError, MuserError

DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)
"""Errors that say that a node or process died, and nothing about what it did."""


def error_of_user(error: BaseException | None) -> MuserError | None:
    """The error for users that Ray has wrapped, if it is one."""
    while error is not None and not isinstance(error, MuserError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Ray: the one that this process has joined, that of RAY_ADDRESS, or a new one on this machine."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError:
        raise ClusterError(f"RAY_ADDRESS is {address}, but no Ray cluster answers there") from None
    try:
        yield
    finally:
        ray.shutdown()
