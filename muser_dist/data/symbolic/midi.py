"""MIDI files to MIDI Text Format and back.

MIDI Text Format (MTF) is that of M3 (CLaMP 2, arXiv 2410.13267, section 3.2). The first line is "ticks_per_beat N".
Then comes each message of all tracks, merged, as its type and values; the time since the one before is the first value
of a channel's message, and the last of a meta message. Texts and system exclusive messages, which may hold words, are
left out, and their time goes to the next message. But for those and for which track a message was in, the MIDI comes
back as it was: every note, tempo, program and control at its tick.
"""

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import mido
from mido.midifiles.meta import build_meta_message

from muser_dist.errors import DataError

_CHANNEL_TYPES = {
    0x80: "note_off",
    0x90: "note_on",
    0xA0: "polytouch",
    0xB0: "control_change",
    0xC0: "program_change",
    0xD0: "aftertouch",
    0xE0: "pitchwheel",
}
_CHANNEL_VALUES = {
    "note_off": ("channel", "note", "velocity"),
    "note_on": ("channel", "note", "velocity"),
    "polytouch": ("channel", "note", "value"),
    "control_change": ("channel", "control", "value"),
    "program_change": ("channel", "program"),
    "aftertouch": ("channel", "value"),
    "pitchwheel": ("channel", "pitch"),
}
_META_VALUES = {
    0x00: ("sequence_number", ("number",)),
    0x20: ("channel_prefix", ("channel",)),
    0x21: ("midi_port", ("port",)),
    0x51: ("set_tempo", ("tempo",)),
    0x54: ("smpte_offset", ("frame_rate", "hours", "minutes", "seconds", "frames", "sub_frames")),
    0x58: ("time_signature", ("numerator", "denominator", "clocks_per_click", "notated_32nd_notes_per_beat")),
    0x59: ("key_signature", ("key",)),
}
_META_TYPES = dict(_META_VALUES.values())
_END_OF_TRACK = 0x2F

_LONGEST_NUMBER = 4
"""Bytes of a number of variable length; the standard has no longer ones. A negative time looks like one."""
_LONGEST_TIME = (1 << 7 * _LONGEST_NUMBER) - 1

_TIME = re.compile(r"\d{1,9}", re.ASCII)
_HEAD = re.compile(r"ticks_per_beat [1-9]\d{0,4}", re.ASCII)
_MESSAGES = {
    name: re.compile(rf"{name}(?: -?\d{{1,9}}){{{1 + len(values)}}}", re.ASCII)
    for name, values in _CHANNEL_VALUES.items()
} | {
    name: re.compile(rf"{name}(?: (?:-?\d{{1,9}}(?:\.\d{{1,3}})?|[A-G][#b]?m?)){{{len(values)}}} \d{{1,9}}", re.ASCII)
    for name, values in (*_META_TYPES.items(), ("end_of_track", ()))
}
"""How a line of MTF must look, by its first word."""

_PROGRAM = re.compile(r"^(program_change \d+ \d+) \d+$", re.MULTILINE)


class _Event(NamedTuple):
    """A message that has a place in MTF: its tick, its type and its values but for the time."""

    tick: int
    name: str
    values: str
    meta: bool


def midi_to_mtf(data: bytes, max_events: int) -> str:
    """The text of a MIDI file of format 0 or 1.

    Args:
        data: the file.
        max_events: most events, those left out included.

    Raises:
        DataError: it is no such file, is broken or truncated, has too many events, or no note.
    """
    tracks, ticks_per_beat = _split_tracks(data)
    events: list[_Event] = []
    last = count = 0
    for begin, end in tracks:
        for tick, event in _read_track(data[begin:end], begin):
            count += 1
            if count > max_events:
                raise DataError(f"MIDI of more than {max_events:,} events (data.symbolic.max_events)")
            last = max(last, tick)
            if event is not None:
                events.append(event)
    if not any(event.name == "note_on" and not event.values.endswith(" 0") for event in events):
        raise DataError("MIDI without notes")
    events.sort(key=lambda event: event.tick)  # stable: at one tick the order of tracks
    lines, now = [f"ticks_per_beat {ticks_per_beat}"], 0
    for tick, name, values, meta in [*events, _Event(last, "end_of_track", "", True)]:
        if tick - now > _LONGEST_TIME:
            raise DataError(f"MIDI that is silent for {tick - now:,} ticks, more than a time may have")
        words = (name, values, tick - now) if meta else (name, tick - now, values)
        lines.append(" ".join(str(word) for word in words if word != ""))
        now = tick
    return "\n".join([*lines, ""])


def _split_tracks(data: bytes) -> tuple[list[tuple[int, int]], int]:
    """First byte and end of each track, and the ticks of a quarter note."""
    if data[:4] != b"MThd" or len(data) < 14:
        raise DataError("no MIDI: it does not begin with MThd")
    header = int.from_bytes(data[4:8], "big")
    kind, count, division = (int.from_bytes(data[i : i + 2], "big") for i in (8, 10, 12))
    if header < 6:
        raise DataError(f"broken MIDI: a header of {header} bytes")
    if kind > 1:
        raise DataError(f"MIDI of format {kind}; only 0 and 1 say which notes sound together")
    if division == 0 or division & 0x8000:
        raise DataError("MIDI whose time is no fraction of beats")
    tracks: list[tuple[int, int]] = []
    at = 8 + header
    while len(tracks) < count:
        if at + 8 > len(data):
            raise DataError(f"truncated MIDI: {len(tracks)} of {count} tracks")
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "big")
        if end > len(data):
            raise DataError(f"truncated MIDI: the chunk at byte {at} has fewer bytes than it says")
        if data[at : at + 4] == b"MTrk":  # the standard wants other chunks to be skipped
            tracks.append((at + 8, end))
        at = end
    return tracks, division


def _read_track(track: bytes, begin: int) -> Iterator[tuple[int, _Event | None]]:
    """Tick of each event of a track, and the event unless it has no place in MTF; errors count from byte `begin`."""
    at = tick = status = 0
    try:
        while at < len(track):
            delta, at = _number(track, at)
            tick += delta
            byte = track[at]
            if byte >= 0x80:
                at += 1
                # Only a channel's status runs on, the standard says; many files rely on it behind meta messages too.
                if byte != 0xFF:
                    status = byte
            elif 0x80 <= status < 0xF0:
                byte = status
            else:
                raise DataError(f"broken MIDI: data without a status at byte {begin + at}")
            if byte == 0xFF:
                kind = track[at]
                content, at = _content(track, at + 1)
                if kind == _END_OF_TRACK:
                    yield tick, None
                    return
                yield tick, _meta_event(tick, kind, content)
            elif byte in (0xF0, 0xF7):
                _, at = _content(track, at)
                yield tick, None
            elif byte < 0xF0:
                size = 1 if 0xC0 <= byte < 0xE0 else 2
                content = _take(track, at, size)
                if max(content) >= 0x80:
                    raise DataError(f"broken MIDI: a value of {max(content)} at byte {begin + at}; the most is 127")
                at += size
                yield tick, _channel_event(tick, byte, content)
            else:
                raise DataError(f"broken MIDI: status {byte:#x} before byte {begin + at}, which no file may hold")
    except IndexError:
        raise DataError(f"truncated MIDI: the track at byte {begin} ends inside an event") from None


def _content(track: bytes, at: int) -> tuple[bytes, int]:
    """The bytes whose number stands before them, and where they end."""
    size, at = _number(track, at)
    return _take(track, at, size), at + size


def _number(track: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for i in range(at, at + _LONGEST_NUMBER):
        byte = track[i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, i + 1
    raise DataError("broken MIDI: a time or a length takes more than 4 bytes, as a negative one does")


def _take(track: bytes, at: int, size: int) -> bytes:
    if at + size > len(track):
        raise IndexError
    return track[at : at + size]


def _channel_event(tick: int, status: int, content: bytes) -> _Event:
    name = _CHANNEL_TYPES[status & 0xF0]
    numbers = [(content[0] | content[1] << 7) - 8192] if name == "pitchwheel" else content
    return _Event(tick, name, " ".join(map(str, (status & 0x0F, *numbers))), False)


def _meta_event(tick: int, kind: int, content: bytes) -> _Event | None:
    if kind not in _META_VALUES:
        return None
    name, values = _META_VALUES[kind]
    try:
        message = build_meta_message(kind, list(content))
        return _Event(tick, name, " ".join(str(getattr(message, value)) for value in values), True)
    except Exception as error:  # mido checks no lengths: any error may come
        raise DataError(f"broken MIDI: {name} of bytes {content[:16].hex(' ')}: {error}") from None


def mtf_to_midi(text: str) -> bytes:
    """The MIDI file, of format 0, that a text stands for.

    Args:
        text: as `midi_to_mtf` gives it; without the last line, or from `patches.to_text` of a head, too.

    Raises:
        DataError: a line is no message; says which.
    """
    first, *lines = text.splitlines() or [""]
    track = mido.MidiTrack()
    try:
        name, ticks = first.split(" ")
        ticks_per_beat = int(ticks)
        if name != "ticks_per_beat" or not 0 < ticks_per_beat < 0x8000:
            raise ValueError
    except ValueError:
        raise DataError(f"MIDI text: the first line is {first[:40]!r}, not ticks_per_beat and a number") from None
    for number, line in enumerate(lines, start=2):
        try:
            message = _message(line)
            if not 0 <= message.time <= _LONGEST_TIME:
                raise ValueError("the time is out of range")
            message.bytes()  # what cannot be written says so here, where the line is known
            track.append(message)
        except Exception as error:  # mido checks values in many ways
            raise DataError(f"MIDI text: line {number}, {line[:40]!r}: {error}") from None
    file = io.BytesIO()
    mido.MidiFile(type=0, ticks_per_beat=ticks_per_beat, tracks=[track]).save(file=file)
    return file.getvalue()


def _message(line: str) -> mido.Message | mido.MetaMessage:
    name, *values = line.split(" ")
    if name in _CHANNEL_VALUES:
        when, *numbers = map(int, values)
        return mido.Message(name, time=when, **dict(zip(_CHANNEL_VALUES[name], numbers, strict=True)))
    if name == "end_of_track":
        (when,) = map(int, values)
        return mido.MetaMessage(name, time=when)
    if name not in _META_TYPES:
        raise ValueError("no such message")
    *settings, time = values
    parsed = [setting if name == "key_signature" else _plain_number(setting) for setting in settings]
    return mido.MetaMessage(name, time=int(time), **dict(zip(_META_TYPES[name], parsed, strict=True)))


def _plain_number(text: str) -> int | float:
    return float(text) if "." in text else int(text)  # frame rates may be 29.97


def clean_mtf(data: bytes, max_events: int) -> str:
    """A file that holds MTF already, as CLaMP's data do: without the messages that `midi_to_mtf` leaves out.

    Args:
        data: the file.
        max_events: most messages, those left out included.

    Raises:
        DataError: its first line is another, a message is broken, there are too many, or no note.
    """
    first, *lines = data.decode("ascii", errors="replace").splitlines() or [""]
    if not _HEAD.fullmatch(first):
        raise DataError(f"MIDI text: the first line is {first[:40]!r}, not ticks_per_beat and a number")
    if len(lines) > max_events:
        raise DataError(f"MIDI text of more than {max_events:,} messages (data.symbolic.max_events)")
    kept, waited, notes = [first], 0, False
    for number, line in enumerate(lines, start=2):
        name, *values = line.split(" ")
        channel = name in _CHANNEL_VALUES
        if not channel and name not in _META_TYPES and name != "end_of_track":
            # Of texts the time comes last; of system exclusive messages it comes first.
            time = values[0 if name == "sysex" else -1] if values else ""
            waited += int(time) if _TIME.fullmatch(time) else 0
            continue
        if not _MESSAGES[name].fullmatch(line):
            raise DataError(f"MIDI text: line {number}, {line[:40]!r}, is no message")
        at = 0 if channel else -1
        values[at] = str(int(values[at]) + waited)
        waited = 0
        kept.append(" ".join([name, *values]))
        notes = notes or (name == "note_on" and values[-1] != "0")
    if not notes:
        raise DataError("MIDI text without notes")
    return "\n".join([*kept, ""])


def hide_programs(mtf: str) -> str:
    """The text with every program 0."""
    return _PROGRAM.sub(r"\1 0", mtf)
