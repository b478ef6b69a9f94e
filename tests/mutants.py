"""Damaged and hostile variants of a good shard, the same for the same seed.

The kinds are those that readers of tar, JSON and audio have fallen for: what bits rot, what an
interrupted upload leaves, and what somebody would write who means harm. A variant composes one
to three of them.
"""

import io
import json
import random
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache

import av
import numpy as np
import soundfile

from tests.shardmaker import encode, tone

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


def _flip(rng: random.Random, data: bytes, start: int, stop: int, bits: int) -> bytes:
    flipped = bytearray(data)
    for _ in range(bits):
        flipped[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


# What bits rot and what is cut off.


def bits(rng: random.Random, data: bytes) -> bytes:
    return _flip(rng, data, 0, len(data), rng.randint(1, 64))


def header_bits(rng: random.Random, data: bytes) -> bytes:
    header, _ = rng.choice(_members(data))
    data = _flip(rng, data, header, header + BLOCK, rng.randint(1, 8))
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


@lru_cache
def _sound(kind: str) -> bytes:
    return encode(tone(1, 0.3, 8_000), 8_000, kind)


def _encode_with_ffmpeg(waveform: np.ndarray, container: str, codec: str) -> bytes:
    """The int16 waveform at 8 kHz in containers and codecs that libsndfile does not write, or not twice the same."""
    packed = io.BytesIO()
    with av.open(packed, "w", format=container, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(codec, rate=8_000, layout="mono")
        for start in range(0, len(waveform), 1 << 16):
            frame = av.AudioFrame.from_ndarray(waveform[None, start : start + (1 << 16)], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8_000, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return packed.getvalue()


_FOREIGN_CODECS = {"ogg": "libopus", "mp4": "aac", "matroska": "flac"}


@lru_cache
def _foreign_sound(container: str) -> bytes:
    waveform = np.round(tone(1, 0.3, 8_000) * 32767).astype(np.int16)
    return _encode_with_ffmpeg(waveform, container, _FOREIGN_CODECS[container])


_HOUR = np.zeros(3600 * 8_000, np.int16)


@lru_cache
def _silent_hour() -> bytes:
    """An hour in 90 kB."""
    return encode(_HOUR, 8_000)


@lru_cache
def _silent_hour_in_matroska() -> bytes:
    """The same where libsndfile does not find it, so that FFmpeg has to decode it whole."""
    return _encode_with_ffmpeg(_HOUR, "matroska", "flac")


def _lying_flac(rng: random.Random) -> bytes:
    rate, channels, total = rng.choice([0, 1, 8_000, 655_350]), rng.choice([1, 2, 8]), rng.choice([0, 1, (1 << 36) - 1])
    info = (rate << 44 | (channels - 1) << 41 | 15 << 36 | total).to_bytes(8, "big")
    return _sound("flac")[:18] + info + _sound("flac")[26:]


def _lying_wav(rng: random.Random) -> bytes:
    kind, bits = rng.choice([(1, 16), (3, 32), (1, 0), (1, 65_535), (2, 4), (17, 4), (0xFFFE, 16)])
    channels, rate = rng.choice([0, 1, 255, 65_535]), rng.choice([0, 1, 8_000, 1 << 31, (1 << 32) - 1])
    align = rng.choice([0, 2, 65_535, (channels * bits // 8) & 0xFFFF])
    size = rng.choice([0, 4_000, (1 << 31) - 1, (1 << 32) - 1])
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * align & 0xFFFFFFFF, align, bits)
    chunks = (
        b"fmt " + struct.pack("<I", rng.choice([16, 16, 16, 0, 1 << 31])) + form + b"data" + struct.pack("<I", size)
    )
    return rng.choice([b"RIFF", b"RIFX", b"RF64"]) + b"\xff\xff\xff\xffWAVE" + chunks + rng.randbytes(4_000)


def _lying_ogg(rng: random.Random) -> bytes:
    """The last page says that the stream is longer, or shorter, than it is."""
    data = _foreign_sound("ogg")
    start = data.rindex(b"OggS")
    page = bytearray(data[start:])
    page[6:14] = rng.choice([0, 1, (1 << 40), (1 << 63) - 1, (1 << 64) - 1]).to_bytes(8, "little")
    page[22:26] = bytes(4)
    check = 0
    for byte in page:  # a page with a wrong checksum would be skipped
        check ^= byte << 24
        for _ in range(8):
            check = (check << 1 ^ (0x104C11DB7 if check >> 31 else 0)) & 0xFFFFFFFF
    page[22:26] = check.to_bytes(4, "little")
    return data[:start] + bytes(page)


def _lying_mp3(rng: random.Random) -> bytes:
    """The tag in the first frame says that the stream has 2^32 - 1 frames, or none."""
    data = _sound("mp3")
    tag = max(data.find(b"Xing"), data.find(b"Info"))
    lie = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff"])
    return data[: tag + 8] + lie * 2 + data[tag + 16 :] if tag >= 0 else data


@lru_cache
def _any_sound(kind: str) -> bytes:
    if kind in _FOREIGN_CODECS:
        return _foreign_sound(kind)
    packed = io.BytesIO()
    soundfile.write(packed, tone(2, 0.3, 8_000), 8_000, format=kind)
    return packed.getvalue()


# RAW has no header, SD2 is two files, and libsndfile writes the time of day into the others.
_KINDS = [*_FOREIGN_CODECS, *sorted(set(soundfile.available_formats()) - {"RAW", "SD2", "OGG", "MAT5"})]


def _damaged_sound(rng: random.Random) -> bytes:
    """Any format that the decoder would recognise by its content, with its header damaged or its end cut off."""
    data = _any_sound(rng.choice(_KINDS))
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    return _flip(rng, data, 0, min(len(data), rng.choice([64, 256, 4096])), rng.randint(1, 16))


_PLAYLISTS = [  # what FFmpeg might follow to other files or to the network (port 9 of the loopback interface is closed)
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    b'<?xml version="1.0"?><MPD type="static"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1">'
    b"<BaseURL>http://127.0.0.1:9/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
]


def audio_body(rng: random.Random, data: bytes) -> bytes:
    body = rng.choice(
        [_silent_hour, _silent_hour_in_matroska, lambda: rng.choice(_PLAYLISTS), lambda: rng.randbytes(99)]
    )
    return _replace(rng, data, b".flac", body())


def lying_header(rng: random.Random, data: bytes) -> bytes:
    make = rng.choice([_lying_flac, _lying_wav, _lying_ogg, _lying_mp3])
    return _replace(rng, data, b".flac", make(rng))


def damaged_sound(rng: random.Random, data: bytes) -> bytes:
    return _replace(rng, data, b".flac", _damaged_sound(rng))


MUTATIONS: tuple[Mutation, ...] = (
    *(bits, header_bits, hole, cut_at_header, cut, zeros, garbage, duplicate, move, swap),
    *(hostile_name, long_name, nested, hostile_size, hostile_kind, hostile_sparse, pax),
    *(json_body, audio_body, lying_header, damaged_sound),
)
