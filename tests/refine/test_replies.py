"""What statuses, headers and bodies of replies mean."""

import json
from email.utils import formatdate
from time import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.refine.answers import Answer
from muser_dist.refine.replies import MAX_REPLY_BYTES, read_reply


def completion(content="text", usage=(3, 4), **choice):
    values = {"choices": [{"message": {"content": content}, "finish_reason": "stop"} | choice]}
    if usage is not None:
        values["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return json.dumps(values).encode()


def test_completions():
    reply = read_reply(200, {}, completion())
    assert (reply.answer, reply.tokens, reply.paid) == (Answer("text", "stop"), (3, 4), True)
    for usage in (None, (-1, 4), ("3", 4), (3, 10**12), (3, None)):
        assert read_reply(200, {}, completion(usage=usage)).tokens is None
    refused = read_reply(200, {}, completion(None, message={"content": None, "refusal": "No."}))
    assert refused.answer == Answer("", "refusal")
    assert read_reply(200, {}, completion(finish_reason=None)).answer == Answer("text", "")
    half = completion().replace(b'"text"', b'"\\ud83d"')
    assert read_reply(200, {}, half).answer == Answer("?", "stop")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b"\xff", b"1"])
def test_what_is_no_completion_may_have_been_paid(body):
    reply = read_reply(200, {}, body)
    assert reply.answer is None and reply.paid and reply.again and not reply.fatal
    assert read_reply(200, {}, b" " * (MAX_REPLY_BYTES + 1)).paid


@pytest.mark.parametrize(
    ("status", "paid", "again", "fatal"),
    [
        (400, False, False, False),
        (401, False, False, True),
        (403, False, False, True),
        (404, False, False, True),
        (307, False, False, True),
        (408, True, True, False),
        (413, False, False, False),
        (429, False, True, False),
        (500, False, True, False),
        (503, False, True, False),
        (504, True, True, False),
        (529, False, True, False),
    ],
)
def test_statuses(status, paid, again, fatal):
    for body in (b"", b"<html>", b'{"error": {"message": "because"}}', b'{"error": "because"}'):
        reply = read_reply(status, {}, body)
        assert (reply.paid, reply.again, reply.fatal) == (paid, again, fatal)
        assert reply.answer is None and reply.problem


def test_no_credit_is_not_waited_for():
    reply = read_reply(429, {}, b'{"error": {"code": "insufficient_quota", "message": "pay"}}')
    assert reply.fatal and not reply.again


def test_retry_after():
    assert read_reply(429, {"Retry-After": "7"}, b"").wait == 7
    assert read_reply(503, {"retry-after": "0.5"}, b"").wait == 0.5
    assert abs(read_reply(429, {"Retry-After": formatdate(time() + 60, usegmt=True)}, b"").wait - 60) < 5
    assert read_reply(429, {"Retry-After": formatdate(time() - 60, usegmt=True)}, b"").wait == 0
    for nonsense in ("", "soon", "-5", "²", "Mon, 99 Foo"):
        assert read_reply(429, {"Retry-After": nonsense}, b"").wait is None


@given(
    st.integers(100, 599), st.dictionaries(st.just("Retry-After"), st.text()), st.binary() | st.text().map(json.dumps)
)
def test_no_reply_breaks_the_reader(status, headers, body):
    reply = read_reply(status, headers, body if isinstance(body, bytes) else body.encode())
    assert reply.answer is None and reply.problem
