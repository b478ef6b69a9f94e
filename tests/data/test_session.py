"""Joining a cluster that is not there."""

import socket
import time

import pytest

from muser_dist.data.session import join
from muser_dist.errors import ClusterError


def test_an_address_where_no_cluster_answers_is_told_at_once():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # of nobody, once it is closed
    start = time.monotonic()
    with pytest.raises(ClusterError, match=rf"no Ray cluster answers at \S+:{port} \(RAY_ADDRESS\)"):
        join(f"127.0.0.1:{port}")
    assert time.monotonic() - start < 60  # Ray itself would go on for a quarter of an hour


@pytest.mark.parametrize("address", ["", "somewhere", "somewhere:port"])
def test_what_is_no_address_is_no_traceback(address):
    with pytest.raises(ClusterError, match="RAY_ADDRESS"):
        join(address)
