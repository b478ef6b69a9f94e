"""What an HTTP reply of an OpenAI-compatible endpoint means: an answer, what it cost, and whether to try again.

An error status is not billed, except those of a gateway that has stopped waiting while the model may still be at work.
A reply that is cut off or makes no sense may have been billed.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from muser_dist.data.text import one_line
from muser_dist.refine.answers import Answer

MAX_REPLY_BYTES = 4 << 20
"""No description is longer; what is, is not read to its end."""

_MOST = 10**8  # tokens; an endpoint that counts more counts wrong

_FATAL = {
    401: "refuses the key",
    402: "wants to be paid first",
    403: "refuses access",
    404: "knows no such address or model",
    405: "does not take chat completions",
}

# The gateway gave up (504; 524 is Cloudflare's), or the server while reading (408): the model may have answered.
_PERHAPS_PAID = (408, 504, 524)

_PASSING = (409, 425, 429)  # besides 5xx


@dataclass(frozen=True)
class Reply:
    """What came of sending a request once.

    Attributes:
        answer: of the model.
        tokens: of input and output that the endpoint counts; None where it tells none.
        problem: why there is no answer.
        paid: whether it may have been billed.
        again: whether the same request may do better.
        wait: seconds that the endpoint wants to be left alone.
        fatal: whether no other request would do better either.
        connected: whether the request could be sent at all.
    """

    answer: Answer | None = None
    tokens: tuple[int, int] | None = None
    problem: str = ""
    paid: bool = False
    again: bool = False
    wait: float | None = None
    fatal: bool = False
    connected: bool = True


def read_reply(status: int, headers: Mapping[str, str], body: bytes) -> Reply:
    """What a reply means.

    Args:
        status: HTTP status.
        headers: of the reply; names in any case.
        body: all of it, or more than `MAX_REPLY_BYTES` of it.
    """
    if len(body) > MAX_REPLY_BYTES:
        return Reply(problem=f"the reply has more than {MAX_REPLY_BYTES:,} bytes", paid=True)
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if 200 <= status < 300:
        return _completion(values)
    error = values.get("error") if isinstance(values, dict) else None
    told = error if isinstance(error, dict) else {}
    said = one_line(str(told.get("message", "")))[:200]
    problem = f"status {status}" + (f": {said}" if said else "")
    if told.get("code") == "insufficient_quota" or told.get("type") == "insufficient_quota":
        return Reply(problem="has no credit left for this key", fatal=True)
    if 300 <= status < 400:
        return Reply(problem="redirects to another address, which must be given itself", fatal=True)
    if status in _FATAL:
        # What it says of a key may quote the key.
        return Reply(problem=f"{_FATAL[status]} (status {status})", fatal=True)
    if status in _PERHAPS_PAID:
        return Reply(problem=problem, paid=True, again=True, wait=_retry_after(headers))
    if status in _PASSING or status >= 500:
        return Reply(problem=problem, again=True, wait=_retry_after(headers))
    return Reply(problem=problem)


def _completion(values: Any) -> Reply:
    """The reply with a chat completion, if it is one."""
    usage = values.get("usage") if isinstance(values, dict) else None
    counted = usage if isinstance(usage, dict) else {}
    input, output = counted.get("prompt_tokens"), counted.get("completion_tokens")
    tokens = None
    if isinstance(input, int) and isinstance(output, int) and 0 <= min(input, output) <= max(input, output) <= _MOST:
        tokens = (input, output)
    try:
        choice = values["choices"][0]
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
        if choice["message"].get("refusal"):
            finish = "refusal"
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply(tokens=tokens, problem="the reply is no chat completion", paid=True, again=True)
    # SQLite and JSON write no half of a surrogate pair.
    text = content.encode(errors="replace").decode() if isinstance(content, str) else ""
    return Reply(Answer(text, finish if isinstance(finish, str) else ""), tokens, paid=True)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3: seconds or a date); None where none makes sense."""
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    try:
        if value[:1].isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
