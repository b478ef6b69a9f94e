"""Asks a language model, many requests at a time, without spending more than the cap.

One process sends all requests: they cost it hardly any time, it alone knows what may still be spent and when the
endpoint wants to be left alone, and when it dies nothing goes on spending.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from muser_dist.data.storage import redact
from muser_dist.errors import EndpointError, require
from muser_dist.refine.ledger import Ledger, Prices
from muser_dist.refine.prompt import Request
from muser_dist.refine.replies import MAX_REPLY_BYTES, Reply, read_reply

LONGEST_PAUSE = 60.0
"""Seconds between two attempts at most, where the endpoint does not ask for more."""

LONGEST_RETRY_AFTER = 900.0
"""Seconds that an endpoint may ask to be left alone; when it wants more, the job ends and says so."""

# Of each item: such attempts cost money and gave nothing.
_PAID_ATTEMPTS = 2

_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: base URL of an OpenAI-compatible API, such as http://localhost:8000/v1.
        key: sent as bearer token; none when empty.
        key_variable: the environment variable that it comes from, for errors.
        concurrency: requests at a time.
        timeout: seconds of an attempt.
        attempts: of an item, before it is given up.
        first_pause: seconds before the second attempt, on average twice as many before each further one.
        grace: seconds in which it may still be starting; when it could not be reached till then, the job ends.
    """

    url: str
    key: str = field(default="", repr=False)
    key_variable: str = ""
    concurrency: int = 16
    timeout: float = 120.0
    attempts: int = 8
    first_pause: float = 1.0
    grace: float = 15.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        require(valid, "--endpoint must be a URL such as http://localhost:8000/v1")
        require(
            not (parts.username or parts.password or parts.query or parts.fragment),
            "--endpoint holds a user, a password or a query, which would be saved; give a key in the environment",
        )
        require(self.concurrency >= 1, "--concurrency must be at least 1")
        require(self.timeout > 0, "--timeout must be positive")
        require(self.attempts >= 1, "--attempts must be at least 1")
        plain = self.key.isascii() and self.key.isprintable() and not any(map(str.isspace, self.key))
        require(plain, f"--key-variable: {self.key_variable} holds what is no key: spaces, line breaks or other signs")

    @property
    def proxy(self) -> str | None:
        """The proxy that the environment names. (aiohttp would read .netrc too, which rules out a bearer token.)"""
        parts = urlsplit(self.url)
        return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)

    def without_secrets(self, text: str) -> str:
        """The text without the key, which endpoints may quote, and without a proxy's password."""
        return redact(text.replace(self.key, "***") if self.key else text)


class Asker:
    """Asks each request until it is answered, given up or beyond the cap.

    Args:
        endpoint: where they go.
        ledger: writes down what is asked and answered.
        prices: of tokens.
        progress: called after each item that was asked about, with the number of those that need no more asking. Not
            for what was answered before, which says nothing about the speed.
    """

    def __init__(
        self, endpoint: Endpoint, ledger: Ledger, prices: Prices, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        self.endpoint = endpoint
        self.ledger = ledger
        self.prices = prices
        self.progress = progress
        self.capped = False
        """Whether the cap has ended it."""
        self.given_up = 0
        """Items that have no answer, however often they were asked about."""
        self.reason = ""
        """Why the last of them has none."""
        self._done = 0
        self._taken: set[str] = set()  # digests that are asked about just now, or were given up
        self._failed_in_a_row = 0
        self._first_attempt: float | None = None
        self._connected = False
        self._error: EndpointError | None = None

    def run(self, batches: Iterator[list[Request | None]]) -> None:
        """Asks all requests.

        Args:
            batches: the requests; None stands for an item about which nothing can be asked.

        Raises:
            EndpointError: the endpoint refuses everything, cannot be reached, or has not answered for long or at all.
                What came before is kept.
        """
        try:
            asyncio.run(self._run(batches))
        except ExceptionGroup as errors:  # all for the same cause, such as a full disk
            raise errors.exceptions[0] from None
        # An endpoint that has answered in an earlier job may well have no answer to the few items that are left.
        if self.given_up and not (self._connected and self.ledger.any_answer):
            self._stop(f"gave no answer to any of {self.given_up} items, to the last because: {self.reason}")
        if self._error is not None:
            raise self._error

    async def _run(self, batches: Iterator[list[Request | None]]) -> None:
        self._batches = batches
        self._waiting: deque[Request | None] = deque()
        self._turn = asyncio.Lock()
        self._settled = asyncio.Condition()
        self._on_their_way = 0
        self._not_before = 0.0
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout, sock_connect=_CONNECT_SECONDS),
            # A kept connection that the server closes as a request goes out looks like an answer that was lost.
            connector=aiohttp.TCPConnector(limit=self.endpoint.concurrency, force_close=True),
        )
        async with session, asyncio.TaskGroup() as group:
            for _ in range(self.endpoint.concurrency):
                group.create_task(self._work(session))

    @property
    def _ended(self) -> bool:
        return self.capped or self._error is not None

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while not self._ended:
            async with self._turn:
                while not self._waiting:
                    batch = await asyncio.to_thread(next, self._batches, None)
                    if batch is None:
                        return
                    self._waiting.extend(batch)
                request = self._waiting.popleft()
            # An item with the same metadata may be asking the same just now, or have paid for no answer to it.
            if request is None or request.digest in self._taken or self.ledger.answered(request.digest):
                self._done += 1
                continue
            self._taken.add(request.digest)
            if await self._ask(session, request):
                self._done += 1
                self.progress(self._done)
            if self.ledger.answered(request.digest):
                self._taken.remove(request.digest)

    async def _ask(self, session: aiohttp.ClientSession, request: Request) -> bool:
        """Asks until there is an answer, or the item is given up; False where the job ends before."""
        most = self.prices.cost(request.most_input, request.most_output)
        paid = 0
        now = asyncio.get_running_loop().time
        for attempt in range(self.endpoint.attempts):
            await self._pause(attempt)
            if self._first_attempt is None:
                self._first_attempt = now()
            number = await self._reserve(request.digest, most)
            if number is None:
                return False
            reply = await self._send(session, request)
            await self._settle(number, reply)
            self._connected = self._connected or reply.connected
            if reply.answer is not None:
                self._failed_in_a_row = 0
                if reply.tokens is not None and self.prices.cost(*reply.tokens) > most:
                    self._stop(
                        f"counts {reply.tokens[0]:,} and {reply.tokens[1]:,} tokens of input and output, where "
                        f"{request.most_input:,} and {request.most_output:,} are the most there may be: it cannot be "
                        "held to --max-cost. Models that think need max_completion_tokens in --parameters"
                    )
                return True
            paid += reply.paid
            if not self._connected and now() - self._first_attempt > self.endpoint.grace:
                self._stop(f"cannot be reached: {reply.problem}; check --endpoint, and whether it runs")
                return False
            if reply.fatal:
                variable = self.endpoint.key_variable or "(none given)"
                self._stop(f"{reply.problem}; check --endpoint, --model and what is in --key-variable {variable}")
                return False
            if reply.wait is not None and reply.wait > LONGEST_RETRY_AFTER:
                self._stop(f"asks to be left alone for {reply.wait:,.0f} s; give the same command again then")
                return False
            self._not_before = max(self._not_before, now() + (reply.wait or 0.0))
            if not reply.again or paid >= _PAID_ATTEMPTS:
                break
        reason = f"{reply.problem}, after {attempt + 1} attempts" if attempt else reply.problem
        self.reason = self.endpoint.without_secrets(reason)
        self.given_up += 1
        self.ledger.fail(request.digest, f"the endpoint gave no answer: {self.reason}")
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(20, 2 * self.endpoint.concurrency):
            self._stop(f"gave no answer to {self._failed_in_a_row} items in a row, to the last because: {self.reason}")
        return True

    def _stop(self, what: str) -> None:
        """Ends the job; what is on its way is waited for."""
        self._error = self._error or EndpointError(
            self.endpoint.without_secrets(f"the endpoint {self.endpoint.url} {what}. What is answered is kept")
        )

    async def _pause(self, attempt: int) -> None:
        """Waits before an attempt: longer each time, and at random, so that a crowd does not come back at once."""
        now = asyncio.get_running_loop().time
        most = min(LONGEST_PAUSE, 2 * self.endpoint.first_pause * 2.0 ** (attempt - 1)) if attempt else 0.0
        until = now() + random.random() * most
        while not self._ended and (left := until - now()) > 0:
            await asyncio.sleep(min(left, 1.0))
        while not self._ended and (left := self._not_before - now()) > 0:
            await asyncio.sleep(min(left, 1.0) + random.random() * self.endpoint.first_pause)

    async def _reserve(self, digest: str, most: int) -> int | None:
        """The number under which a request may be sent; None when there is nothing to spend, or the job ends."""
        async with self._settled:
            while not self._ended:
                number = self.ledger.reserve(digest, most)
                if number is not None:
                    self._on_their_way += 1
                    return number
                if not self._on_their_way:
                    self.capped = True
                    self._settled.notify_all()
                else:  # they will cost less than they may
                    await self._settled.wait()
        return None

    async def _send(self, session: aiohttp.ClientSession, request: Request) -> Reply:
        url, proxy = f"{self.endpoint.url.rstrip('/')}/chat/completions", self.endpoint.proxy
        try:
            async with session.post(url, data=request.body.encode(), allow_redirects=False, proxy=proxy) as response:
                body = bytearray()
                async for block in response.content.iter_chunked(1 << 16):
                    body += block
                    if len(body) > MAX_REPLY_BYTES:
                        break
                return read_reply(response.status, response.headers, bytes(body))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Reply(problem=f"no connection ({error})", again=True, connected=False)  # so nothing was sent
        except TimeoutError:
            return Reply(problem=f"no reply in {self.endpoint.timeout:g} s", paid=True, again=True)
        except (aiohttp.ClientError, OSError) as error:
            return Reply(problem=f"the connection broke ({error or type(error).__name__})", paid=True, again=True)

    async def _settle(self, number: int, reply: Reply) -> None:
        cost: int | None = 0
        if reply.paid:
            cost = self.prices.cost(*reply.tokens) if reply.tokens is not None else None
        async with self._settled:
            self.ledger.settle(number, cost, reply.tokens, reply.answer)
            self._on_their_way -= 1
            self._settled.notify_all()
