"""An HTTP proxy on the loopback interface that breaks the reading and writing of objects on a schedule.

It stands before one object store and passes requests on. Of what is read, only successful answers
about objects are broken, not listings. A write that meets a fault is refused, and never gets there.
"""

import http.client
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Kind = Literal["reset", "slow_down", "stall", "close"]

SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""


@dataclass(frozen=True)
class Fault:
    """What happens to one answer.

    Attributes:
        kind: "reset" sends a TCP reset amid the body, "close" ends the connection there cleanly,
            "stall" sends nothing more until the client hangs up, "slow_down" is a status 503
            instead of the answer.
        part: of the body that is sent before, in [0, 1).
    """

    kind: Kind
    part: float = 0.5


Schedule = Callable[[str, str, int], Fault | None]
"""(method, path, how many such requests came before) to the fault. By path, because requests for
several objects come in any order; the path is "/<bucket>/<key>"."""


def never(method: str, path: str, before: int) -> Fault | None:
    """The schedule without faults."""
    return None


def seeded(seed: int, rates: Mapping[Kind, float], most: int = 3) -> Schedule:
    """Faults at random, the same for the same seed.

    Args:
        seed: of the choice of faults, and of where they fall in the body.
        rates: by kind, the probability that a request meets it.
        most: after so many requests for one object, nothing breaks any more.
    """

    def schedule(method: str, path: str, before: int) -> Fault | None:
        rng = random.Random(f"{seed} {method} {path} {before}")
        kinds = [*rates, None]
        (kind,) = rng.choices(kinds, [*rates.values(), 1 - sum(rates.values())])
        return Fault(kind, rng.random()) if kind is not None and before < most else None

    return schedule


class FaultProxy(ThreadingHTTPServer):
    """The proxy; `fault_proxy` runs one.

    Attributes:
        injected: faults so far, by kind.
        gets: GET requests for objects so far, by path.
        body_bytes: bytes of the bodies sent in answer to them, by path.
    """

    daemon_threads = False  # closing waits for them: no thread outlives the test

    def __init__(self, origin: tuple[str, int], schedule: Schedule, methods: frozenset[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.origin = origin
        self.schedule = schedule
        self.methods = methods
        self.injected: Counter[Kind] = Counter()
        self.gets: Counter[str] = Counter()
        self.body_bytes: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._before: Counter[tuple[str, str]] = Counter()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.server_address[:2]
        return str(host), int(port)

    def next_fault(self, method: str, path: str, body: bytes) -> Fault | None:
        """Counts the request, and says what is to happen to its answer."""
        with self.lock:
            before = self._before[method, path]
            self._before[method, path] += 1
            self.gets[path] += method == "GET"
            fault = self.schedule(method, path, before) if method in self.methods else None
            if fault is not None and fault.kind != "slow_down" and not body:
                fault = None  # what has no body cannot break off in it
            if fault is not None:
                self.injected[fault.kind] += 1
            return fault

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections that clients keep open, and with them the threads that serve them."""
        with self.lock:
            for connection in self._connections:
                with suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with suppress(ConnectionError):  # clients hang up as they like
            super().handle()

    def do_GET(self) -> None:
        origin = http.client.HTTPConnection(*self.server.origin)
        try:
            origin.request(self.command, self.path, headers=dict(self.headers))
            answer = origin.getresponse()
            body = answer.read()
        finally:
            origin.close()
        path = unquote(urlsplit(self.path).path)
        is_object = path.strip("/").count("/") > 0 and answer.status in (200, 206)
        fault = self.server.next_fault(self.command, path, body) if is_object else None
        if fault is not None and fault.kind == "slow_down":
            self._send_head(503, {"Content-Type": "application/xml", "Content-Length": str(len(SLOW_DOWN))})
            self.wfile.write(b"" if self.command == "HEAD" else SLOW_DOWN)
            return
        headers = {name.lower(): value for name, value in answer.getheaders()}
        for hop in ("connection", "transfer-encoding"):
            headers.pop(hop, None)
        if self.command == "GET":
            headers["content-length"] = str(len(body))
        sent = body if fault is None else body[: int(len(body) * fault.part)]
        if is_object:
            with self.server.lock:  # before they are sent, so that who has read them sees them counted
                self.server.body_bytes[path] += len(sent)
        self._send_head(answer.status, headers)
        self.wfile.write(sent)
        if fault is not None:
            self._break(fault.kind)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.server.next_fault(self.command, path, body) is not None:
            self._send_head(503, {"Content-Type": "application/xml", "Content-Length": str(len(SLOW_DOWN))})
            self.wfile.write(SLOW_DOWN)
            return
        origin = http.client.HTTPConnection(*self.server.origin)
        try:
            origin.request(self.command, self.path, body, dict(self.headers))
            answer = origin.getresponse()
            answered = answer.read()
        finally:
            origin.close()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        for hop in ("connection", "transfer-encoding"):
            headers.pop(hop, None)
        if answer.status != 204:
            headers["content-length"] = str(len(answered))
        self._send_head(answer.status, headers)
        self.wfile.write(answered)

    do_POST = do_DELETE = do_PUT

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _break(self, kind: Kind) -> None:
        self.close_connection = True
        if kind == "stall":
            self.connection.recv(1)  # returns when the client, or the end of the proxy, closes the connection
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The server would say goodbye (FIN) first; closed at once, the socket sends a reset alone.
            os.close(self.connection.detach())

    def log_message(self, *_: object) -> None:
        """Says nothing: what happened is in the counters."""


@contextmanager
def fault_proxy(
    origin: tuple[str, int], schedule: Schedule = never, methods: frozenset[str] = frozenset({"GET", "HEAD"})
) -> Iterator[FaultProxy]:
    """Runs a proxy before the store at `origin`.

    Args:
        origin: host and port.
        schedule: what breaks and when. An answer to HEAD has no body, so only "slow_down" befalls it.
        methods: whose answers may break.
    """
    with FaultProxy(origin, schedule, methods) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
            proxy.hang_up()
