"""The faults that other tests rely on do happen, as scheduled and no others."""

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import s3fs

from tests.fault_proxy import SLOW_DOWN, Fault, fault_proxy, seeded
from tests.object_store import endpoint, object_store, storage_options

BODY = bytes(range(256)) * 4096  # more than socket buffers hold at first
OBJECT = "/corpus/train-00000.tar"


class Origin(BaseHTTPRequestHandler):
    """Answers every GET and HEAD with BODY."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(BODY)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def origin() -> Iterator[tuple[str, int]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Origin) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield "127.0.0.1", server.server_port
        server.shutdown()
        thread.join()


def first(fault: Fault):
    """A schedule: the first request for each object meets the fault, later ones none."""
    return lambda method, path, before: fault if before == 0 else None


def get(address: tuple[str, int], timeout: float = 20.0) -> http.client.HTTPResponse:
    client = http.client.HTTPConnection(*address, timeout=timeout)
    client.request("GET", OBJECT)
    return client.getresponse()


def test_several_requests_go_over_one_connection_and_are_counted(origin):
    with fault_proxy(origin) as proxy:
        client = http.client.HTTPConnection(*proxy.address)
        client.connect()
        own = client.sock.getsockname()
        for _ in range(3):
            client.request("GET", OBJECT)
            assert client.getresponse().read() == BODY
        assert client.sock.getsockname() == own
        client.close()
    assert proxy.gets == {OBJECT: 3}
    assert proxy.body_bytes == {OBJECT: 3 * len(BODY)}
    assert not proxy.injected


def test_a_reset_comes_amid_the_body(origin):
    with fault_proxy(origin, first(Fault("reset"))) as proxy:
        with pytest.raises(ConnectionResetError):
            get(proxy.address).read()
        assert get(proxy.address).read() == BODY
    assert proxy.injected == {"reset": 1}
    assert proxy.body_bytes[OBJECT] == len(BODY) // 2 + len(BODY)


def test_a_clean_close_is_a_short_read(origin):
    with fault_proxy(origin, first(Fault("close", 0.25))) as proxy:
        with pytest.raises(http.client.IncompleteRead) as error:
            get(proxy.address).read()
        assert error.value.partial == BODY[: len(BODY) // 4]
        assert get(proxy.address).read() == BODY
    assert proxy.injected == {"close": 1}


def test_a_stall_lasts_until_the_client_gives_up(origin):
    with fault_proxy(origin, first(Fault("stall"))) as proxy:
        answer = get(proxy.address, timeout=0.3)
        assert answer.read(len(BODY) // 2) == BODY[: len(BODY) // 2]
        with pytest.raises(TimeoutError):
            answer.read(1)
        answer.close()
        assert get(proxy.address).read() == BODY
    assert proxy.injected == {"stall": 1}


def test_the_end_of_the_proxy_ends_a_stall(origin):
    with fault_proxy(origin, first(Fault("stall"))) as proxy:
        answer = get(proxy.address)
        answer.read(len(BODY) // 2)
    with pytest.raises(http.client.IncompleteRead):  # and leaving the block did not hang
        answer.read()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_slow_down_is_a_503_in_the_form_of_s3_and_the_connection_stays(origin, method):
    with fault_proxy(origin, first(Fault("slow_down"))) as proxy:
        client = http.client.HTTPConnection(*proxy.address)
        client.request(method, OBJECT)
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (503, SLOW_DOWN if method == "GET" else b"")
        client.request(method, OBJECT)
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (200, BODY if method == "GET" else b"")
        client.close()
    assert proxy.injected == {"slow_down": 1}


def test_faults_spare_methods_that_are_not_named_listings_and_heads_without_a_body(origin):
    for method, path, methods in [
        ("GET", OBJECT, {"HEAD"}),
        ("GET", "/corpus?list-type=2", {"GET"}),
        ("HEAD", OBJECT, {"HEAD"}),
    ]:
        with fault_proxy(origin, first(Fault("reset")), frozenset(methods)) as proxy:
            client = http.client.HTTPConnection(*proxy.address)
            client.request(method, path)
            assert client.getresponse().status == 200
            client.close()
        assert not proxy.injected


def test_a_seeded_schedule_repeats_itself_has_its_rates_and_ends():
    rates = {"reset": 0.2, "slow_down": 0.1, "stall": 0.1, "close": 0.1}
    schedule, again, other = seeded(1, rates), seeded(1, rates), seeded(2, rates)
    asked = [("GET", f"/corpus/{i}", n) for i in range(1000) for n in range(4)]
    faults = [schedule(*each) for each in asked]
    assert faults == [again(*each) for each in asked] != [other(*each) for each in asked]
    assert all(fault is None for fault, (_, _, before) in zip(faults, asked, strict=True) if before == 3)
    for kind, rate in rates.items():
        assert sum(fault is not None and fault.kind == kind for fault in faults) == pytest.approx(3000 * rate, rel=0.2)


def test_s3fs_reads_objects_through_the_proxy(tmp_path):
    file = tmp_path / "train-00000.tar"
    file.write_bytes(BODY)
    with object_store() as store:
        (url,) = store.upload(file)
        with fault_proxy(store.address) as proxy:
            options = storage_options(endpoint(proxy.address))
            files = s3fs.S3FileSystem(**options, skip_instance_cache=True)
            assert files.glob("s3://corpus/*.tar") == ["corpus/train-00000.tar"]
            assert files.cat_file(url) == BODY
            assert files.cat_file(url, start=1000, end=1100) == BODY[1000:1100]
            with files.open(url, block_size=1 << 16) as shard:
                shard.seek(300_000)
                assert shard.read(70_000) == BODY[300_000:370_000]
        assert not proxy.injected
        assert proxy.gets[OBJECT] >= 3
        assert len(BODY) <= proxy.body_bytes[OBJECT] < 2 * len(BODY)  # ranges are not whole objects
