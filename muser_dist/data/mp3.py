"""How long an mp3 is.

An encoder that knows says so in the first frame (the tag Xing or Info). Without it libmpg123 divides the file's size by
the first frame's, which is wrong where the bit rate varies or a tag holds a picture. Frames say where the next one
begins, so they can be counted without decoding.
"""

from typing import BinaryIO

_KBITS = {
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {0b11: (44_100, 48_000, 32_000), 0b10: (22_050, 24_000, 16_000), 0b00: (11_025, 12_000, 8_000)}


# With a constant bit rate so many frames, some of them a byte longer than others, are a whole number of bytes. Going
# so many at a time, such a file is counted in next to no time; in any other a hop soon meets no frame like the first.
_TOGETHER = 49


def _frame_bytes() -> dict[bytes, tuple[int, int]]:
    """Bytes of a frame of layer III, and of _TOGETHER at its bit rate, by the first three bytes of its header."""
    sizes = {}
    for version, rates in _RATES.items():
        for r, rate in enumerate(rates):
            for k, kbits in enumerate(_KBITS[1 if version == 0b11 else 2], 1):
                bytes_times_rate = (144_000 if version == 0b11 else 72_000) * kbits
                for bits in range(8):  # whether it has a checksum and a padding byte, and a private bit
                    checksum, padding, private = bits >> 2, bits >> 1 & 1, bits & 1
                    head = (0xFF, 0xE2 | version << 3 | checksum, k << 4 | r << 2 | padding << 1 | private)
                    sizes[bytes(head)] = bytes_times_rate // rate + padding, _TOGETHER * bytes_times_rate // rate
    return sizes


_FRAME_BYTES = _frame_bytes()

# What may follow the last frame.
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3")

# Before the first frame; a file of nothing else would take long.
_MOST_ID3_TAGS = 8

_BLOCK_BYTES = 1 << 18


def count_samples(file: BinaryIO, claimed: int) -> int | None:
    """Samples of each channel, by the count of frames where the first one does not say.

    Time grows with the file's size alone, whatever is in it: less than a microsecond for each frame.

    Args:
        file: an mp3; where it is read next is kept.
        claimed: what libsndfile takes for the number of samples.

    Returns:
        The number; `claimed` where the first frame says it. None where there is something between the frames.
    """
    here = file.tell()
    try:
        return _count(file, claimed)
    finally:
        file.seek(here)


def _count(file: BinaryIO, claimed: int) -> int | None:
    at = 0
    for _ in range(_MOST_ID3_TAGS):
        head = _read(file, at, 10)
        if not head.startswith(b"ID3") or len(head) < 10:
            break
        footer = 10 * (head[5] >> 4 & 1)
        at += 10 + sum((byte & 127) << 7 * i for i, byte in enumerate(reversed(head[6:]))) + footer
    first = _read(file, at, 64)
    if _says_its_frames(first):
        return claimed
    _, together = _FRAME_BYTES.get(first[:3], (0, 0))
    if not together:
        return None
    hops = 0
    while _read(file, at + (hops + 1) * together, 3) == first[:3]:
        hops += 1
    frames, end = _walk(file, at + hops * together)
    if hops and frames >= _TOGETHER:  # the rate is not constant after all
        hops = 0
        frames, end = _walk(file, at)
    tail = _read(file, end, 16)
    if tail and not tail.startswith(_TAGS):
        return None
    return (hops * _TOGETHER + frames) * (1152 if first[1] >> 3 & 1 else 576)


def _walk(file: BinaryIO, at: int) -> tuple[int, int]:
    """The number of frames that follow each other, and where the last one ends."""
    frames, begin = 0, -1
    while begin != at:
        begin = at
        block, i = _read(file, begin, _BLOCK_BYTES), 0
        while sizes := _FRAME_BYTES.get(block[i : i + 3]):
            i += sizes[0]
            frames += 1
        at += i
    return frames, at


def _says_its_frames(frame: bytes) -> bool:
    """Whether the begin of a frame has a tag with the number of frames in it."""
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    tag = frame[at + 4 : at + 12] if at >= 0 else b""
    return len(tag) == 8 and bool(tag[3] & 1) and any(tag[4:])


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
