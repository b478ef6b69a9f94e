"""Ray for jobs that start and end with it."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions
from ray._private.services import canonicalize_bootstrap_address

from muser_dist.errors import ClusterError, MuserError

DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)
"""Errors that say that a node or process died, and nothing about what it did."""

_ANSWER_SECONDS = 10


def error_of_user(error: BaseException | None) -> MuserError | None:
    """The error for users that Ray has wrapped, if it is one."""
    while error is not None and not isinstance(error, MuserError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def join(address: str, **options: Any) -> None:
    """ray.init, but where nobody answers it says so at once; Ray would try for a quarter of an hour.

    Args:
        address: "local", "auto", or a cluster's.
        options: of ray.init.

    Raises:
        ConnectionError: the address is "auto", and this machine knows of no cluster; or Ray cannot join it.
        ClusterError: nobody answers where it should be, or the address is none.
    """
    try:
        where = None if "://" in address else canonicalize_bootstrap_address(address)
    except ValueError:
        raise ClusterError(f"RAY_ADDRESS is {address!r}; give HOST:PORT, auto or local") from None
    if where is not None:
        host, _, port = where.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        except (OSError, ValueError, OverflowError) as error:
            named = "the last one that this machine was part of" if address == "auto" else "RAY_ADDRESS"
            raise ClusterError(
                f"no Ray cluster answers at {where} ({named}): {error}; start it, or set RAY_ADDRESS=local to do "
                "without (`ray stop` makes this machine forget the last one)"
            ) from None
    ray.init(address, **options)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Ray: the one that this process has joined, that of RAY_ADDRESS, or a new one on this machine."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        join(address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError:
        raise ClusterError(f"RAY_ADDRESS is {address}, but no Ray cluster answers there") from None
    try:
        yield
    finally:
        ray.shutdown()
