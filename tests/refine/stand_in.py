"""A stand-in for a language model behind an OpenAI-compatible endpoint, on the loopback interface.

It answers about items whose metadata names them ("item-17"), in the way that a schedule says, and counts what it was
asked and what it would have charged for it.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from muser_dist.refine.ledger import Prices

TEXTS = {
    "en": "A calm tune for the flute in a minor key, played at dusk, called {}.",
    "fr": "Un air paisible pour la flûte en mode mineur, joué au crépuscule : {}.",
    "es": "Una melodía tranquila para flauta en modo menor, tocada al anochecer: {}.",
    "de": "Eine ruhige Weise für Flöte in Moll, in der Dämmerung gespielt: {}.",
    "pt": "Uma melodia calma para flauta em modo menor, tocada ao entardecer: {}.",
    "ru": "Спокойная мелодия для флейты в миноре, её играют в сумерках: {}.",
    "el": "Μια ήρεμη μελωδία για φλάουτο σε ελάσσονα, παίζεται το σούρουπο: {}.",
    "ar": "لحن هادئ للناي في مقام صغير يُعزف عند الغسق: {}.",
    "hi": "बाँसुरी के लिए एक शांत धुन, जो साँझ में बजाई जाती है: {}.",
    "zh": "黄昏时演奏的一首宁静的小调长笛曲，旋律悠扬动听：{}。",
    "ja": "夕暮れに奏でられる、短調の穏やかなフルートの曲です：{}。",
    "ko": "해 질 녘에 연주되는 단조의 고요한 플루트 곡입니다: {}.",
    "th": "ทำนองสงบสำหรับขลุ่ยในบันไดเสียงไมเนอร์ บรรเลงยามพลบค่ำ: {}",
}

Schedule = Callable[[str, int], str]
"""(item, how many requests about it came before) to what happens, the name of a method of `_Handler`."""

PRICES = Prices.per_million(2.0, 8.0)


class StandIn:
    """A running endpoint.

    Attributes:
        url: its base URL.
        schedule: what happens.
        asked: requests by item.
        charged: units of money for all of them. One that nobody waits for any more costs its most.
        authorizations: headers that came, by value.
        most_at_a_time: requests that it had to answer at once.
    """

    def __init__(self, schedule: Schedule, port: int) -> None:
        self.schedule = schedule
        self.asked: Counter[str] = Counter()
        self.charged = 0
        self.authorizations: Counter[str | None] = Counter()
        self.most_at_a_time = 0
        self.now = 0
        self.lock = threading.Lock()
        self.reached = threading.Condition(self.lock)
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.block_on_close = False
        self._server.stand_in = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def wait_until_asked(self, count: int, seconds: float = 60.0) -> bool:
        """Waits for so many requests."""
        with self.lock:
            return self.reached.wait_for(lambda: self.asked.total() >= count, seconds)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        stand_in: StandIn = self.server.stand_in  # type: ignore[attr-defined]
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompt = self.body["messages"][-1]["content"]
        found = re.search(r"item-\w+", self.prompt)
        self.item = found[0] if found else "unnamed"
        codes = re.findall(r'"(\w\w)": "the description in', self.prompt)
        self.language = next(code for code in codes if code != "en")
        with stand_in.lock:
            before = stand_in.asked[self.item]
            stand_in.asked[self.item] += 1
            stand_in.authorizations[self.headers["Authorization"]] += 1
            stand_in.now += 1
            stand_in.most_at_a_time = max(stand_in.most_at_a_time, stand_in.now)
            stand_in.reached.notify_all()
        kind, _, argument = stand_in.schedule(self.item, before).partition(":")
        with suppress(ConnectionError):
            getattr(self, kind)(*([argument] if argument else []))
        with stand_in.lock:
            stand_in.now -= 1

    # --- What may happen ---

    def good(self) -> None:
        self.answer({"en": TEXTS["en"].format(self.item), self.language: TEXTS[self.language].format(self.item)})

    def fenced(self) -> None:
        content = {"en": TEXTS["en"].format(self.item), self.language: TEXTS[self.language].format(self.item)}
        self.complete(f"```json\n{json.dumps(content, ensure_ascii=False)}\n```")

    def wrong_language(self) -> None:
        self.answer({"en": TEXTS["en"].format(self.item), self.language: TEXTS["en"].format("another")})

    def nonsense(self) -> None:
        self.complete("la la la")

    def empty(self) -> None:
        self.complete("")

    def refusal(self) -> None:
        self.complete("I'm sorry, but I can't help with that.")

    def too_long(self) -> None:
        self.complete('{"en": "A calm', finish="length")

    def greedy(self) -> None:
        self.complete("{}", output=10 * self.body["max_tokens"])

    def busy(self, seconds: str = "0") -> None:
        self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": seconds})

    def broken(self) -> None:
        self.reply(500, {"error": {"message": "internal"}})

    def gateway(self) -> None:
        self.charge(self.tokens(), self.body["max_tokens"])
        self.reply(504, {})

    def refused_input(self) -> None:
        self.reply(400, {"error": {"message": "bad input"}})

    def unauthorised(self) -> None:
        self.reply(401, {"error": {"message": f"wrong key: {self.headers['Authorization']}"}})

    def quoting(self) -> None:
        self.reply(500, {"error": {"message": f"I was sent {self.headers['Authorization']}"}})

    def no_credit(self) -> None:
        self.reply(429, {"error": {"code": "insufficient_quota", "message": "pay"}})

    def moved(self) -> None:
        self.reply(307, {}, {"Location": "http://127.0.0.1:9/"})

    def no_json(self) -> None:
        self.charge(self.tokens(), self.body["max_tokens"])
        self.send(200, b'{"choices": [', {})

    def cut(self) -> None:
        self.charge(self.tokens(), self.body["max_tokens"])
        self.send(200, b'{"choices": [', {"Content-Length": "1000"})

    def stall(self) -> None:
        self.charge(self.tokens(), self.body["max_tokens"])
        self.rfile.read(1)  # until the client hangs up

    # --- How ---

    def tokens(self) -> int:
        return len(self.prompt.encode()) // 4

    def charge(self, input: int, output: int) -> None:
        stand_in: StandIn = self.server.stand_in  # type: ignore[attr-defined]
        with stand_in.lock:
            stand_in.charged += PRICES.cost(input, output)

    def answer(self, content: dict[str, str]) -> None:
        self.complete(json.dumps(content, ensure_ascii=False))

    def complete(self, content: str, finish: str = "stop", output: int | None = None) -> None:
        output = len(content.encode()) // 4 + 1 if output is None else output
        self.charge(self.tokens(), output)
        self.reply(
            200,
            {
                "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish}],
                "usage": {"prompt_tokens": self.tokens(), "completion_tokens": output},
            },
        )

    def reply(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(values).encode(), headers or {})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def stand_in(schedule: Schedule = lambda item, before: "good", port: int = 0) -> Iterator[StandIn]:
    """Starts an endpoint, at any free port where none is given; it is gone at the end."""
    running = StandIn(schedule, port)
    thread = threading.Thread(target=running._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running._server.shutdown()
        running._server.server_close()
