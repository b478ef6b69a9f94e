"""Damaged and hostile variants of a good shard, the same for the same seed.

The kinds are those that readers of tar, JSON and audio have fallen for: what bits rot, what an
interrupted upload leaves, and what somebody would write who means harm. A variant composes one
to three of them.
"""

import json
import random
from collections.abc import Callable, Iterator

from tests.hostile_sounds import (
    PLAYLISTS,
    flip,
    lying_flac,
    lying_mp3,
    lying_ogg,
    lying_wav,
    rotten_sound,
    silent_hour,
    silent_hour_in_matroska,
)

BLOCK = 512

# Fields of a tar header: (first byte, length).
NAME, SIZE, CHECKSUM, KIND, LINK, SPARSE = (0, 100), (124, 12), (148, 8), (156, 1), (157, 100), (386, 97)

Mutation = Callable[[random.Random, bytes], bytes]


def mutants(shard: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields (name of the mutations, bytes of the shard) `count` times.

    Mutant i of a seed is the same for any count, and every kind comes first in turn.
    """
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        kinds = [MUTATIONS[number % len(MUTATIONS)], *rng.choices(MUTATIONS, k=rng.randrange(3))]
        data = shard
        for mutate in kinds:
            if not _members(data):
                break  # nothing is left to mutate
            data = mutate(rng, data)
        yield f"{seed}/{number} {'+'.join(kind.__name__ for kind in kinds)}", data


# Tar headers, by hand: the tarfile module refuses to write most of what follows.


def _members(data: bytes) -> list[tuple[int, int]]:
    """Where each header begins and where the next one does, as far as the sizes make sense."""
    found, offset = [], 0
    while any(data[offset : offset + BLOCK]):
        try:
            size = int(data[offset + 124 : offset + 136].rstrip(b"\0 "), 8)
        except ValueError:
            break
        end = offset + BLOCK + size + -size % BLOCK
        if size < 0 or end > len(data):
            break
        found.append((offset, end))
        offset = end
    return found


def _entry(name: bytes, body: bytes, kind: bytes = b"0") -> bytes:
    """A member: its header, its body, and zeros up to a whole block."""
    header = name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
    header += b"%011o\0" % len(body) + b"%011o\0" % 0 + bytes(8) + kind + bytes(100) + b"ustar\00000"
    return _repair(header.ljust(BLOCK, b"\0"), 0) + body + bytes(-len(body) % BLOCK)


def _repair(data: bytes, header: int) -> bytes:
    """Makes the checksum of the header at this offset right, so that the parser believes it."""
    total = sum(data[header : header + BLOCK]) - sum(data[header + 148 : header + 156]) + 8 * ord(" ")
    return data[: header + 148] + b"%06o\0 " % total + data[header + 156 :]


def _set(data: bytes, header: int, field: tuple[int, int], value: bytes) -> bytes:
    """Overwrites a field of the header at this offset, checksum included."""
    start, length = header + field[0], field[1]
    return _repair(data[:start] + value[:length].ljust(length, b"\0") + data[start + length :], header)


def _insert(rng: random.Random, data: bytes, what: bytes) -> bytes:
    """Puts bytes before one of the members."""
    start, _ = rng.choice(_members(data))
    return data[:start] + what + data[start:]


# What bits rot and what is cut off.


def bits(rng: random.Random, data: bytes) -> bytes:
    return flip(rng, data, 0, len(data), rng.randint(1, 64))


def header_bits(rng: random.Random, data: bytes) -> bytes:
    header, _ = rng.choice(_members(data))
    data = flip(rng, data, header, header + BLOCK, rng.randint(1, 8))
    return _repair(data, header) if rng.random() < 0.5 else data


def hole(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.choice([1, 100, 512, 4096]), len(data) - start)
    return data[:start] + rng.choice([b"\0", b"\xff"]) * length + data[start + length :]


def cut_at_header(rng: random.Random, data: bytes) -> bytes:
    header, _ = rng.choice(_members(data))
    return data[: max(0, header + rng.choice([-511, -1, 0, 1, 511]))]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def zeros(rng: random.Random, data: bytes) -> bytes:
    return _insert(rng, data, bytes(BLOCK * rng.randint(1, 3)))


def garbage(rng: random.Random, data: bytes) -> bytes:
    noise = rng.randbytes(rng.choice([1, 511, 512, 5000]))
    end = _members(data)[-1][1]
    return rng.choice([data + noise, data[:end] + noise + data[end:], data[:end] + noise])


# Members in the wrong place.


def duplicate(rng: random.Random, data: bytes) -> bytes:
    start, end = rng.choice(_members(data))
    return _insert(rng, data, data[start:end])


def move(rng: random.Random, data: bytes) -> bytes:
    start, end = rng.choice(_members(data))
    last = _members(data)[-1][1]
    return data[:start] + data[end:last] + data[start:end] + data[last:]


def swap(rng: random.Random, data: bytes) -> bytes:
    (a, a_end), (b, b_end) = sorted(rng.choices(_members(data), k=2))
    return data if a == b else data[:a] + data[b:b_end] + data[a_end:b] + data[a:a_end] + data[b_end:]


# Headers that mean harm.

_NAMES = [
    *(b"../x.json", b"/etc/passwd", b"/etc/passwd.flac", b"a/../../b.json", b"a\0b.json", b"a\nb.json", b"", b" "),
    *(b".", b"..", b"...", b"./.", b".json", b"/", b"//", b"\xff\xfe\x80.flac", b"\xed\xa0\x80.json", b"C:\\x.json"),
    *(b"x" * 100, b"." * 100, b"a/" * 50, b"piece00000.flac.json", b"piece00000", b"{}.json", b"%s%n.json"),
]


def hostile_name(rng: random.Random, data: bytes) -> bytes:
    header, _ = rng.choice(_members(data))
    return _set(data, header, NAME, rng.choice(_NAMES))


def long_name(rng: random.Random, data: bytes) -> bytes:
    name = rng.choice([b"n" * 10_000 + b".json", b"d/" * 5_000 + b"x.flac", b"../" * 3_000, b"." * 10_000, *_NAMES])
    if rng.random() < 0.5:
        return _insert(rng, data, _entry(b"././@LongLink", name + b"\0", rng.choice([b"L", b"K"])))
    return _insert(rng, data, _entry(b"PaxHeader", _record(b"path", name), b"x"))


def nested(rng: random.Random, data: bytes) -> bytes:
    """Thousands of headers that each say something about the next."""
    kind = rng.choice([b"L", b"K", b"x", b"g"])
    body = _record(b"path", b"n" * 200) if kind in b"xg" else b"n" * 200 + b"\0"
    return _insert(rng, data, _entry(b"nested", body, kind) * rng.choice([10, 300, 3000]))


_SIZES = [
    *(
        b"00000000000\0",
        b"77777777777\0",
        b"100000000000",
        b"0000000001x\0",
        b"99999999999\0",
        b"-0000000001\0",
        b" " * 12,
    ),
    *(b"1_0_0\0", b"0o17\0", b"\xff\xff\xff", b"\0" * 12, b"00000000001\0", b"00010000000\0"),
    *(
        b"\x80" + number.to_bytes(11, "big")
        for number in (0, 1, 8 << 30, (1 << 30) - 1, 1 << 32, 1 << 45, (1 << 63) - 1, 1 << 80)
    ),
    *(
        b"\xff" + (number % (1 << 88)).to_bytes(11, "big")
        for number in (-1, -512, -1023, -1024, -(1 << 62), -(1 << 80))
    ),
]


def hostile_size(rng: random.Random, data: bytes) -> bytes:
    header, _ = rng.choice(_members(data))
    data = _set(data, header, SIZE, rng.choice(_SIZES))
    # The same lie in a header that the parser reads whole to know a name.
    return _set(data, header, KIND, rng.choice([b"x", b"L", b"g"])) if rng.random() < 0.5 else data


def hostile_kind(rng: random.Random, data: bytes) -> bytes:
    header, _ = rng.choice(_members(data))
    data = _set(data, header, LINK, rng.choice([b"/etc/passwd", b"../../x", b"piece00001.flac", b""]))
    return _set(data, header, KIND, rng.choice([bytes([kind]) for kind in b"\x001234567DKLMNSVXgxZ\xff"]))


def hostile_sparse(rng: random.Random, data: bytes) -> bytes:
    header, _ = rng.choice(_members(data))
    numbers = [b"%011o\0" % n for n in (0, 1, 512, (1 << 33) - 1)] + [b"\x80" + b"\xff" * 11, b"garbage\0", b"\0" * 12]
    field = b"".join(rng.choices(numbers, k=8)) + rng.choice([b"\0", b"\1"])
    return _set(_set(data, header, SPARSE, field), header, KIND, b"S")


def _record(keyword: bytes, value: bytes) -> bytes:
    """A record of a PAX header: its own length, the keyword, the value."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest)
    while length != (whole := len(b"%d" % length) + len(rest)):
        length = whole
    return b"%d" % length + rest


_PAX_VALUES = {
    b"path": [b"", b"\0", b"../../x.json", b"/etc/passwd", b"\xff\xfe", b"a\nb.json", b"x" * 100_000, b"."],
    b"linkpath": [b"/etc/passwd", b""],
    b"size": [
        b"0",
        b"-1",
        b"-1024",
        b"8589934592",
        b"9223372036854775807",
        b"1e9",
        b"nan",
        b"",
        b"9" * 5000,
        b"0x10",
        b"7.5",
    ],
    b"mtime": [b"nan", b"inf", b"1e999", b"x"],
    b"uid": [b"-1", b"9" * 5000],
    b"hdrcharset": [b"BINARY", b"ISO-IR 10646 2000 UTF-8", b"x"],
    b"charset": [b"BINARY", b"rot13", b"zlib_codec"],
    b"GNU.sparse.map": [b"0,1", b"0", b"x,y", b"0,9223372036854775807", b"-1,-1", b"0," * 5000 + b"0"],
    b"GNU.sparse.size": [b"0", b"-1", b"x", b"9223372036854775807"],
    b"GNU.sparse.realsize": [b"-1", b"9" * 5000, b"100"],
    b"GNU.sparse.major": [b"1", b"x"],
    b"GNU.sparse.minor": [b"0", b"1"],
    b"GNU.sparse.name": [b"", b"../x.json", b"\0"],
    b"GNU.sparse.numblocks": [b"1", b"-1", b"99999999"],
    b"GNU.sparse.offset": [b"0", b"-1", b"x"],
    b"GNU.sparse.numbytes": [b"0", b"-1", b"x"],
}
_PAX_MALFORMED = [
    *(b"0 path=x\n", b"-5 path=x\n", b"3 path=x\n", b"99999999999 path=x\n", b"9" * 5000 + b" path=x\n", b"x path=x\n"),
    *(
        b"9 path=xy",
        b"5 =x\n",
        b"4 x\n",
        b"\xff" * 64,
        b"",
        b"11 path=x\0\n",
        b"00000000000010 path=x\n",
        b"9 path" * 5000,
    ),
]


def pax(rng: random.Random, data: bytes) -> bytes:
    records = [
        _record(word, rng.choice(_PAX_VALUES[word])) for word in rng.choices(list(_PAX_VALUES), k=rng.randint(1, 4))
    ]
    if rng.random() < 0.5:
        records.insert(rng.randrange(len(records) + 1), rng.choice(_PAX_MALFORMED))
    return _insert(rng, data, _entry(b"PaxHeader", b"".join(records), rng.choice([b"x", b"g", b"X"])))


# Bodies that mean harm.


def _replace(rng: random.Random, data: bytes, extension: bytes, body: bytes) -> bytes:
    """Gives a member with this extension another body."""
    members = [(start, end) for start, end in _members(data) if extension in data[start : start + 100]]
    if not members:
        return _insert(rng, data, _entry(b"other" + extension, body))
    start, end = rng.choice(members)
    return data[:start] + _entry(data[start : start + 100], body) + data[end:]


_JSON = [
    *(b"[" * 100_000, b'{"a":' * 100_000, b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    *(
        b'{"caption": ' + value + b"}"
        for value in (b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b'"\\ud800"', b'"\xff"')
    ),
    *(b'{"caption": ' + value + b"}" for value in (b'"\\u0000\\n\\u202e"', b"null", b"true", b"{}", b"[[[]]]", b'""')),
    *(
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\0}\0",
        b'{"a": 1',
        b'{"caption": "x"} {}',
        b"\0" * 100,
    ),
    b'{"instrument": "flute", "mode": "\\udfff", "instrument": [1, null, {"a": 2}]}',
    b'{"caption": "' + b"word " * 200_000 + b'"}',
    b'{"caption": "' + "\ufdfa".encode() * 100_000 + b'"}',  # 18 letters each once it is in NFKC
    json.dumps({f"field{i}": i for i in range(20_000)}).encode(),
]


def json_body(rng: random.Random, data: bytes) -> bytes:
    return _replace(rng, data, b".json", rng.choice([*_JSON, rng.randbytes(300)]))


def audio_body(rng: random.Random, data: bytes) -> bytes:
    body = rng.choice([silent_hour, silent_hour_in_matroska, lambda: rng.choice(PLAYLISTS), lambda: rng.randbytes(99)])
    return _replace(rng, data, b".flac", body())


def lying_header(rng: random.Random, data: bytes) -> bytes:
    make = rng.choice([lying_flac, lying_wav, lying_ogg, lying_mp3])
    return _replace(rng, data, b".flac", make(rng))


def damaged_sound(rng: random.Random, data: bytes) -> bytes:
    return _replace(rng, data, b".flac", rotten_sound(rng))


MUTATIONS: tuple[Mutation, ...] = (
    *(bits, header_bits, hole, cut_at_header, cut, zeros, garbage, duplicate, move, swap),
    *(hostile_name, long_name, nested, hostile_size, hostile_kind, hostile_sparse, pax),
    *(json_body, audio_body, lying_header, damaged_sound),
)
