"""Asking an endpoint that misbehaves, over HTTP: every item is answered once or has a reason, and money is counted."""

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.errors import ConfigError, DataError, EndpointError
from muser_dist.refine.answers import read_descriptions
from muser_dist.refine.asker import LONGEST_RETRY_AFTER, Asker, Endpoint
from muser_dist.refine.job import so_far
from muser_dist.refine.languages import NAMES
from muser_dist.refine.ledger import UNIT, Answers, Ledger
from muser_dist.refine.prompt import Prompt, Request
from tests.refine.stand_in import PRICES, stand_in

ROOT = Path(__file__).parents[2]
PROMPT = Prompt("small", ("fr", "ru", "ja"), parameters={"max_tokens": 400})
MUCH = 10 * UNIT


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def items(count: int) -> list[Request]:
    return [PROMPT.request(f"k{i}", {"title": f"item-{i:03d}"}) for i in range(count)]


def endpoint_of(server, **settings) -> Endpoint:
    return Endpoint(**{"url": server.url, "concurrency": 4, "timeout": 10.0, "first_pause": 0.005} | settings)


def ask(
    server, path: Path, requests: list[Request | None], cap: int = MUCH, progress=lambda done: None, **settings
) -> Asker:
    """Asks in one go, as the job does."""
    ledger = Ledger(path, cap)
    try:
        asker = Asker(endpoint_of(server, **settings), ledger, PRICES, progress)
        asker.run(iter([requests[i : i + 5] for i in range(0, len(requests), 5)]))
        return asker
    finally:
        spent = ledger.spending
        ledger.close()
        assert server.charged <= spent.cost <= cap


def found(path: Path, requests: list[Request]) -> list[str | None]:
    """What lies in the ledger of each request: "refined", a reason, or None."""
    answers = Answers(path)
    out = []
    for request in requests:
        answer = answers.get(request.digest)
        if answer is not None and not isinstance(answer, str):
            try:
                read_descriptions(answer, request.language)
                answer = "refined"
            except DataError as error:
                answer = str(error)
        out.append(answer)
    answers.close()
    return out


def test_every_item_is_asked_once(tmp_path):
    requests, shown = items(30), []
    with stand_in() as server:
        asker = ask(server, tmp_path / "l", [*requests, None, *requests[:7]], progress=shown.append)
        assert server.asked == {f"item-{i:03d}": 1 for i in range(30)}
        assert 1 < server.most_at_a_time <= 4
        assert len(shown) == 30 and shown == sorted(set(shown)) and shown[-1] <= 38 and not asker.capped
        assert found(tmp_path / "l", requests) == ["refined"] * 30
        spent = asker.ledger.spending
        assert spent.cost == server.charged == PRICES.cost(spent.input, spent.output) > 0
        assert (spent.requests, spent.presumed) == (30, 0)
        ask(server, tmp_path / "l", requests)  # again: nothing is asked
        assert server.asked.total() == 30


def test_what_was_given_up_is_not_paid_for_again_by_an_item_like_it(tmp_path):
    requests = items(3)
    with stand_in(lambda item, before: "stall" if item == "item-001" else "good") as server:
        ask(server, tmp_path / "l", [*requests, *requests, *requests], timeout=0.3, concurrency=1)
        assert server.asked == {"item-000": 1, "item-001": 2, "item-002": 1}
        ask(server, tmp_path / "l", requests, timeout=0.3)  # another job tries again
        assert server.asked["item-001"] == 4


def test_what_passes_is_tried_again_and_what_does_not_has_a_reason(tmp_path):
    kinds = {
        "item-000": ("busy", "busy", "broken", "good"),
        "item-001": ("stall", "good"),
        "item-002": ("cut", "fenced"),
        "item-003": ("no_json", "good"),
        "item-004": ("gateway", "good"),
        "item-005": ("broken",),
        "item-006": ("stall",),
        "item-007": ("refused_input",),
        "item-008": ("nonsense",),
        "item-009": ("empty",),
        "item-010": ("refusal",),
        "item-011": ("wrong_language",),
        "item-012": ("too_long",),
        "item-013": ("good",),
    }
    requests = items(14)
    with stand_in(lambda item, before: kinds[item][min(before, len(kinds[item]) - 1)]) as server:
        asker = ask(server, tmp_path / "l", requests, timeout=0.5, attempts=5)
        asked = [server.asked[f"item-{i:03d}"] for i in range(14)]
        assert asked == [4, 2, 2, 2, 2, 5, 2, 1, 1, 1, 1, 1, 1, 1]
        states = found(tmp_path / "l", requests)
        other = requests[11].language
        assert states[:5] == ["refined"] * 5 and states[13] == "refined"
        assert "status 500: internal, after 5 attempts" in states[5]
        assert "no reply in 0.5 s, after 2 attempts" in states[6]
        assert "status 400: bad input" in states[7]
        assert states[8:13] == [
            "answer is no JSON",
            "answer is empty",
            "the model refused",
            f'"{other}" is not in the script of {NAMES[other]}: 0% of its letters are',
            "answer is cut off at the most tokens that it may have",
        ]
        # Six attempts may have been paid without giving an answer; they count at their most.
        assert asker.ledger.spending.presumed > 0
        # Nonsense is paid and kept; what got no answer is asked again by the next job.
        before = dict(server.asked)
        server.schedule = lambda item, before: "good"
        ask(server, tmp_path / "l", requests)
        again = {item for item in server.asked if server.asked[item] > before[item]}
        assert again == {"item-005", "item-006", "item-007"}
        assert found(tmp_path / "l", requests)[5:8] == ["refined"] * 3


def test_retry_after_holds_for_all(tmp_path):
    times = []

    def schedule(item, before):
        times.append(time.monotonic())
        return "busy:1" if len(times) == 1 else "good"

    with stand_in(schedule) as server:
        ask(server, tmp_path / "l", items(6), concurrency=1)
        assert times[1] - times[0] >= 1.0
        assert server.asked.total() == 7
    message = "to be left alone for 901 s"
    with (
        stand_in(lambda *_: f"busy:{LONGEST_RETRY_AFTER + 1:.0f}") as server,
        pytest.raises(EndpointError, match=message),
    ):
        ask(server, tmp_path / "m", items(6))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unauthorised", r"refuses the key \(status 401\); check .* --key-variable SECRET_KEY"),
        ("moved", "redirects"),
        ("no_credit", "no credit left"),
        ("quoting", "no answer to 20 items in a row"),
        ("greedy", "cannot be held to --max-cost"),
    ],
)
def test_an_endpoint_that_is_of_no_use_ends_the_job(tmp_path, kind, message):
    key = "sk-very-secret"
    with stand_in(lambda item, before: kind) as server:
        ledger = Ledger(tmp_path / "l", MUCH)
        asker = Asker(endpoint_of(server, key=key, key_variable="SECRET_KEY", attempts=1), ledger, PRICES)
        with pytest.raises(EndpointError, match=message) as caught:
            asker.run(iter([items(60)]))
        ledger.close()
        assert server.asked.total() <= 24 and set(server.authorizations) == {f"Bearer {key}"}
    assert key not in str(caught.value) and key not in repr(asker.endpoint)
    assert all(key.encode() not in file.read_bytes() for file in tmp_path.iterdir())


def test_proxies_of_the_environment(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert Endpoint("https://host/v1").proxy is None
    with stand_in() as server:
        proxy = server.url.removesuffix("/v1").replace("//", "//me:pass@")
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "inside")
        endpoint = Endpoint("http://outside:1/v1", key="sk-very-secret", concurrency=1)
        assert endpoint.proxy == proxy and Endpoint("http://inside/v1").proxy is None
        ledger = Ledger(tmp_path / "l", MUCH)
        Asker(endpoint, ledger, PRICES).run(iter([items(2)]))  # to another host, which only the proxy can reach
        ledger.close()
        assert server.asked.total() == 2 and set(server.authorizations) == {"Bearer sk-very-secret"}
    assert endpoint.without_secrets(f"no way through {proxy} with sk-very-secret") == (
        f"no way through {proxy.replace('me:pass@', '')} with ***"
    )


def test_nobody_there(tmp_path):
    with stand_in() as server:
        pass
    shown: list[int] = []
    began = time.monotonic()
    with pytest.raises(EndpointError, match=r"cannot be reached: no connection .*; check --endpoint"):
        ask(server, tmp_path / "l", items(60), grace=0.5, first_pause=1.0, progress=shown.append)
    assert time.monotonic() - began < 30 and not shown  # eight attempts take a minute


def test_an_endpoint_that_is_still_starting(tmp_path):
    with stand_in() as gone:
        port = int(gone.url.rpartition(":")[2].removesuffix("/v1"))
    refused, answered = threading.Event(), threading.Event()

    class Again(Asker):
        async def _pause(self, attempt: int) -> None:
            if attempt:
                refused.set()
            await super()._pause(attempt)

    def start() -> None:
        refused.wait(30)
        with stand_in(port=port):
            answered.wait(60)

    late = threading.Thread(target=start)
    late.start()
    ledger = Ledger(tmp_path / "l", MUCH)
    Again(endpoint_of(gone, first_pause=0.2), ledger, PRICES).run(iter([items(6)]))
    ledger.close()
    answered.set()
    late.join()
    assert refused.is_set()
    assert found(tmp_path / "l", items(6)) == ["refined"] * 6


def test_an_endpoint_that_answers_nothing_has_refined_nothing(tmp_path):
    """However few the items are; the next job asks about them."""
    with stand_in(lambda item, before: "refused_input") as server:
        with pytest.raises(EndpointError, match=r"no answer to any of 3 items, to the last because: status 400: bad"):
            ask(server, tmp_path / "l", items(3))
        server.schedule = lambda item, before: "good" if item != "item-002" else "refused_input"
        asker = ask(server, tmp_path / "l", items(3))
        assert so_far(asker).endswith(" spent; 1 given up, the last because: status 400: bad input")
        # What is left may be what no endpoint would answer; the job must be able to end.
        assert ask(server, tmp_path / "l", items(3)).given_up == 1
        assert server.asked == {"item-000": 2, "item-001": 2, "item-002": 3}
    with pytest.raises(EndpointError, match="no answer to any of 1 items, to the last because: no connection"):
        ask(server, tmp_path / "l", items(3), attempts=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "must be a URL"),
        ({"url": "http://"}, "must be a URL"),
        ({"url": "http://h:port/v1"}, "must be a URL"),
        ({"url": "ftp://host/v1"}, "must be a URL"),
        ({"url": "http://me:pass@host/v1"}, "would be saved"),
        ({"url": "http://host/v1?key=1"}, "would be saved"),
        ({"concurrency": 0}, "--concurrency"),
        ({"timeout": 0}, "--timeout"),
        ({"attempts": 0}, "--attempts"),
        ({"key": "a\nb", "key_variable": "K"}, "--key-variable: K holds what is no key"),
    ],
)
def test_wrong_endpoints(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Endpoint(**{"url": "http://localhost/v1"} | settings)
    assert "pass@" not in str(caught.value) and "a\nb" not in str(caught.value)


def test_the_cap_ends_asking_and_more_money_goes_on(tmp_path):
    requests = items(40)
    most = max(PRICES.cost(request.most_input, request.most_output) for request in requests)
    with stand_in(lambda item, before: ("broken", "good")[before % 2]) as server:
        asker = ask(server, tmp_path / "l", requests, cap=4 * most)
        assert asker.capped
        states = found(tmp_path / "l", requests)
        assert 4 < states.count("refined") < 40 and set(states) == {"refined", None}
        # It used what it had: another request would not have fitted.
        assert asker.ledger.spending.cost + most > 4 * most
        asked = server.asked.copy()
        assert ask(server, tmp_path / "l", requests, cap=4 * most).capped and server.asked == asked
        assert not ask(server, tmp_path / "l", requests).capped
        assert found(tmp_path / "l", requests) == ["refined"] * 40
        assert all(server.asked[item] == 2 for item in server.asked)
    with stand_in() as server:
        assert ask(server, tmp_path / "m", requests, cap=0).capped and not server.asked


KINDS = ("good", "good", "good", "busy", "broken", "gateway", "no_json", "cut", "nonsense", "refused_input")


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    deaths=st.lists(st.integers(0, 12), max_size=3),
    requests_paid=st.floats(0, 30),
)
def test_whatever_dies_when_the_cap_holds_and_nothing_is_paid_twice(tmp_path_factory, seed, deaths, requests_paid):
    """Jobs of four requests at a time, broken off after some requests, against an endpoint that fails at random."""
    path = tmp_path_factory.mktemp("job") / "l"
    requests = items(12)
    cap = int(requests_paid * PRICES.cost(requests[0].most_input, requests[0].most_output))
    kinds = random.Random(seed)
    good: list[str] = []

    def schedule(item: str, before: int) -> str:
        kind = kinds.choice(KINDS)
        if kind in ("good", "nonsense"):
            good.append(item)
        return kind

    with stand_in(schedule) as server:
        lost = 0
        for death in [*deaths, None]:
            ledger = Ledger(path, cap)
            asker = Asker(endpoint_of(server, attempts=3, first_pause=0.001), ledger, PRICES)
            before = server.asked.total()

            async def die(asker=asker, until=before + (death or 0)) -> None:
                job = asyncio.create_task(asker._run(iter([requests])))
                while not job.done() and server.asked.total() < until:
                    await asyncio.sleep(0.001)
                job.cancel()  # at whatever it awaits; what is on its way has no end
                await asyncio.gather(job, return_exceptions=True)

            if death is None:
                with suppress(EndpointError):  # of an endpoint that has answered nothing at all
                    asker.run(iter([requests]))
            else:
                asyncio.run(die())
                lost += len(ledger._open)
            while server.now:  # it charges what it still does
                time.sleep(0.001)
            assert server.charged <= ledger.spending.cost <= cap
            ledger.close()
        repeated = sum(good.count(item) - 1 for item in set(good))
        assert repeated <= lost
        answered = [state for state in found(path, requests) if state in ("refined", "answer is no JSON")]
        assert len(answered) >= len(set(good)) - lost


KILLED = """
import sys
from pathlib import Path
from muser_dist.refine.asker import Asker
from muser_dist.refine.ledger import Ledger
from tests.refine.stand_in import PRICES
from tests.refine.test_asker import Endpoint, MUCH, items
ledger = Ledger(Path(sys.argv[2]), MUCH)
Asker(Endpoint(sys.argv[1], concurrency=4), ledger, PRICES).run(iter([items(60)]))
"""


def test_a_killed_process_pays_again_only_what_was_on_its_way(tmp_path):
    def schedule(item: str, before: int) -> str:
        time.sleep(0.02)  # as a model that takes a while, so that it is killed amid the work
        return "good"

    with stand_in(schedule) as server:
        job = subprocess.Popen([sys.executable, "-c", KILLED, server.url, tmp_path / "l"], cwd=ROOT)
        assert server.wait_until_asked(20)
        job.kill()
        job.wait()
        ask(server, tmp_path / "l", items(60))
        assert found(tmp_path / "l", items(60)) == ["refined"] * 60
        assert set(server.asked) == {f"item-{i:03d}" for i in range(60)}
        assert sum(count - 1 for count in server.asked.values()) <= 4 and max(server.asked.values()) <= 2


def test_an_error_of_the_reader_ends_the_job_as_it_is(tmp_path):
    def batches() -> Iterator[list[Request]]:
        yield items(3)
        raise DataError("the shard is gone")

    with stand_in() as server:
        ledger = Ledger(tmp_path / "l", MUCH)
        with pytest.raises(DataError, match="the shard is gone"):
            Asker(endpoint_of(server), ledger, PRICES).run(batches())
        ledger.close()


def test_the_request_is_what_the_digest_says(tmp_path):
    (request,) = items(1)
    bodies = []
    with stand_in(lambda item, before: "good") as server:
        handler = server._server.RequestHandlerClass

        class Keeping(handler):
            def good(self) -> None:
                bodies.append((self.path, self.headers["Content-Type"], self.body))
                super().good()

        server._server.RequestHandlerClass = Keeping
        ask(server, tmp_path / "l", [request])
    assert bodies == [("/v1/chat/completions", "application/json", json.loads(request.body))]
