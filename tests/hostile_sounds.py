"""Audio bodies that mean harm, or that time has: headers that lie, hours of silence, playlists."""

import io
import random
import struct
from functools import lru_cache

import av
import numpy as np
import soundfile

from tests.shardmaker import encode, tone


def flip(rng: random.Random, data: bytes, start: int, stop: int, bits: int) -> bytes:
    flipped = bytearray(data)
    for _ in range(bits):
        flipped[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


@lru_cache
def sound(kind: str) -> bytes:
    return encode(tone(1, 0.3, 8_000), 8_000, kind)


def encode_with_ffmpeg(waveform: np.ndarray, container: str, codec: str) -> bytes:
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


FOREIGN_CODECS = {"ogg": "libopus", "mp4": "aac", "matroska": "flac"}


@lru_cache
def foreign_sound(container: str) -> bytes:
    waveform = np.round(tone(1, 0.3, 8_000) * 32767).astype(np.int16)
    return encode_with_ffmpeg(waveform, container, FOREIGN_CODECS[container])


_HOUR = np.zeros(3600 * 8_000, np.int16)


@lru_cache
def silent_hour() -> bytes:
    """An hour in 90 kB."""
    return encode(_HOUR, 8_000)


@lru_cache
def silent_hour_in_matroska() -> bytes:
    """The same where libsndfile does not find it, so that FFmpeg has to decode it whole."""
    return encode_with_ffmpeg(_HOUR, "matroska", "flac")


def lying_flac(rng: random.Random) -> bytes:
    rate, channels, total = rng.choice([0, 1, 8_000, 655_350]), rng.choice([1, 2, 8]), rng.choice([0, 1, (1 << 36) - 1])
    info = (rate << 44 | (channels - 1) << 41 | 15 << 36 | total).to_bytes(8, "big")
    return sound("flac")[:18] + info + sound("flac")[26:]


def lying_wav(rng: random.Random) -> bytes:
    kind, bits = rng.choice([(1, 16), (3, 32), (1, 0), (1, 65_535), (2, 4), (17, 4), (0xFFFE, 16)])
    channels, rate = rng.choice([0, 1, 255, 65_535]), rng.choice([0, 1, 8_000, 1 << 31, (1 << 32) - 1])
    align = rng.choice([0, 2, 65_535, (channels * bits // 8) & 0xFFFF])
    size = rng.choice([0, 4_000, (1 << 31) - 1, (1 << 32) - 1])
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * align & 0xFFFFFFFF, align, bits)
    chunks = (
        b"fmt " + struct.pack("<I", rng.choice([16, 16, 16, 0, 1 << 31])) + form + b"data" + struct.pack("<I", size)
    )
    return rng.choice([b"RIFF", b"RIFX", b"RF64"]) + b"\xff\xff\xff\xffWAVE" + chunks + rng.randbytes(4_000)


def lying_ogg(rng: random.Random) -> bytes:
    """The last page says that the stream is longer, or shorter, than it is."""
    data = foreign_sound("ogg")
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


def lying_mp3(rng: random.Random) -> bytes:
    """The tag in the first frame says that the stream has 2^32 - 1 frames, or none."""
    data = sound("mp3")
    tag = max(data.find(b"Xing"), data.find(b"Info"))
    lie = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff"])
    return data[: tag + 8] + lie * 2 + data[tag + 16 :] if tag >= 0 else data


@lru_cache
def any_sound(kind: str) -> bytes:
    if kind in FOREIGN_CODECS:
        return foreign_sound(kind)
    packed = io.BytesIO()
    soundfile.write(packed, tone(2, 0.3, 8_000), 8_000, format=kind)
    return packed.getvalue()


# RAW has no header, SD2 is two files, and libsndfile writes the time of day into the others.
KINDS = [*FOREIGN_CODECS, *sorted(set(soundfile.available_formats()) - {"RAW", "SD2", "OGG", "MAT5"})]


def rotten_sound(rng: random.Random) -> bytes:
    """Any format that the decoder would recognise by its content, with its header damaged or its end cut off."""
    data = any_sound(rng.choice(KINDS))
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    return flip(rng, data, 0, min(len(data), rng.choice([64, 256, 4096])), rng.randint(1, 16))


PLAYLISTS = [  # what FFmpeg might follow to other files or to the network (port 9 of the loopback interface is closed)
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    b'<?xml version="1.0"?><MPD type="static"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1">'
    b"<BaseURL>http://127.0.0.1:9/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
]
