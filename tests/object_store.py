"""An S3-compatible object store on the loopback interface, for tests that read shards by URL."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

KEY, SECRET, REGION = "test-key", "test-secret", "us-east-1"

# It picks its port itself, so that none can be taken between choosing and binding. It ends when its
# standard input does, so it cannot outlive the tests however they end.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
server.stop()
"""


@dataclass(frozen=True)
class ObjectStore:
    """A running store, with one bucket.

    Attributes:
        address: host and port, for a proxy in front of it.
        bucket: the name of its bucket.
    """

    address: tuple[str, int]
    bucket: str

    @property
    def endpoint(self) -> str:
        """The URL that S3 clients call the endpoint."""
        return endpoint(self.address)

    @property
    def client(self) -> Any:
        """A client of the store itself."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )

    def upload(self, *files: Path, prefix: str = "") -> list[str]:
        """Puts files into the bucket as <prefix><file name>; returns their s3:// URLs."""
        client = self.client
        for file in files:
            client.put_object(Bucket=self.bucket, Key=prefix + file.name, Body=file.read_bytes())
        return [f"s3://{self.bucket}/{prefix}{file.name}" for file in files]


def endpoint(address: tuple[str, int]) -> str:
    """The endpoint URL of a store, or of a proxy, at this host and port."""
    return f"http://{address[0]}:{address[1]}"


def storage_options(endpoint_url: str) -> dict[str, Any]:
    """What s3fs needs to read from the store at this endpoint, or at that of a proxy before it."""
    return {"key": KEY, "secret": SECRET, "endpoint_url": endpoint_url, "client_kwargs": {"region_name": REGION}}


@contextmanager
def object_store(bucket: str = "corpus") -> Iterator[ObjectStore]:
    """Starts a store with an empty bucket in another process; it is gone with all it holds at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            host, port = server.stdout.readline().split()  # it says where it listens once it does
            store = ObjectStore((host.decode(), int(port)), bucket)
            store.client.create_bucket(Bucket=bucket)
            yield store
        finally:
            server.stdin.close()
