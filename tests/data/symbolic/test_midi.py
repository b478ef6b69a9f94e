import io
import random

import mido
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.symbolic.midi import clean_mtf, hide_programs, midi_to_mtf, mtf_to_midi
from muser_dist.errors import DataError
from tests.data.symbolic.notation import NOTE, WORDS, melody, midi_bytes, midi_files

MOST = 100_000


def merged(data: bytes) -> list[tuple[int, dict]]:
    """Tick and values of each message without words, as mido reads and merges the tracks."""
    now, found = 0, []
    for message in mido.MidiFile(file=io.BytesIO(data)).merged_track:
        now += message.time
        if message.type not in WORDS:
            found.append((now, message.copy(time=0).dict()))
    return found


@given(midi_files())
def test_midi_comes_back_with_every_message_at_its_tick(data):
    text = midi_to_mtf(data, MOST)
    back = mtf_to_midi(text)
    assert merged(back) == merged(data)
    assert mido.MidiFile(file=io.BytesIO(back)).ticks_per_beat == mido.MidiFile(file=io.BytesIO(data)).ticks_per_beat
    assert midi_to_mtf(back, MOST) == text


@given(midi_files())
def test_the_text_is_that_of_mido(data):
    """The reference: mido's own messages, with their values as its dictionaries have them."""
    file = mido.MidiFile(file=io.BytesIO(data))
    lines, left_out = [f"ticks_per_beat {file.ticks_per_beat}"], 0
    for message in file.merged_track:
        if message.type in WORDS:
            left_out += message.time
        else:
            lines.append(" ".join(map(str, message.copy(time=message.time + left_out).dict().values())))
            left_out = 0
    assert midi_to_mtf(data, MOST).splitlines() == lines


def test_a_melody_without_its_words():
    text = midi_to_mtf(melody(60, 62), MOST)
    assert text.splitlines() == [
        "ticks_per_beat 480",
        "set_tempo 400000 0",
        "program_change 0 0 40",
        "note_on 0 0 60 90",
        "note_off 480 0 60 64",
        "note_on 0 0 62 90",
        "note_off 480 0 62 64",
        "end_of_track 0",
    ]
    assert hide_programs(text) == text.replace("program_change 0 0 40", "program_change 0 0 0")


def raw(track: bytes, kind: int = 0, tracks: int = 1, division: bytes = b"\x01\xe0") -> bytes:
    head = b"MThd\0\0\0\x06" + kind.to_bytes(2, "big") + tracks.to_bytes(2, "big") + division
    return head + b"MTrk" + len(track).to_bytes(4, "big") + track


def test_running_status_and_chunks_of_others_are_read():
    track = b"\0\x90\x3c\x40\x10\x3c\0\0\xff\x01\x02hi\x05\x3e\x40\0\xff\x2f\0"  # it runs on behind a text, too
    data = raw(track).replace(b"MTrk", b"XFIH\0\0\0\x02..MTrk")
    assert midi_to_mtf(data, MOST).splitlines()[1:] == [
        "note_on 0 0 60 64",
        "note_on 16 0 60 0",
        "note_on 5 0 62 64",
        "end_of_track 0",
    ]


GOOD = b"\0\x90\x3c\x40"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "MThd"),
        (b"RIFF" * 9, "MThd"),
        (raw(GOOD, division=b"\xe7\x28"), "no fraction of beats"),
        (raw(GOOD, division=b"\0\0"), "no fraction of beats"),
        (raw(GOOD, kind=2), "format 2"),
        (raw(GOOD, tracks=2), "truncated MIDI: 1 of 2 tracks"),
        (raw(b"\0\xff\x2f\0"), "without notes"),
        (raw(b"\0\x90\x3c\0"), "without notes"),
        (raw(b"\0\x3c\x40"), "without a status"),
        (raw(b"\0\xf0\x01\xf7\0\x3c\x40"), "without a status"),
        (raw(b"\0\x90\x3c\xff"), "a value of 255"),
        (raw(b"\0\x90\x3c"), "ends inside an event"),
        (raw(b"\0\xff\x51\x7f\x07"), "ends inside an event"),
        (raw(b"\0\xf8" + GOOD), "status 0xf8"),
        (raw(b"\xff\xff\xff\xff\x7f\x90\x3c\x40"), "negative"),  # -1, as writers that do not check write it
        (raw(b"\xff\xff\xff\x7f\xff\x01\0\xff\xff\xff\x7f\x90\x3c\x40"), "silent for"),
        (raw(b"\0\xff\x51\x01\x07" + GOOD), "set_tempo"),
        (raw(b"\0\xff\x59\x02\x7f\0" + GOOD), "key_signature"),
    ],
)
def test_broken_files_say_why(data, reason):
    with pytest.raises(DataError, match=reason):
        midi_to_mtf(data, MOST)


def test_every_truncation_is_found():
    data = melody(60, 64, 67)
    for length in range(len(data)):
        with pytest.raises(DataError):
            midi_to_mtf(data[:length], MOST)


HARMFUL = {
    "notes": (raw(GOOD + b"\0\x3c\x40" * 10_000_000), "more than 100,000 events"),
    "texts": (raw(b"\0\xff\x01\0" * 1_000_000), "more than 100,000 events"),
    "system exclusive": (raw(b"\0\xf0\0" * 1_000_000), "more than 100,000 events"),
    "a time without end": (raw(b"\xff" * 1_000_000), "negative"),
    "a length that lies": (raw(b"\0\xf0\xff\xff\xff\x7f"), "ends inside"),
    "tracks": (raw(b"", tracks=65_535) + b"MTrk\0\0\0\0" * 65_534, "without notes"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HARMFUL)
def test_what_means_harm_takes_neither_time_nor_memory(name):
    data, reason = HARMFUL[name]
    with pytest.raises(DataError, match=reason):
        midi_to_mtf(data, MOST)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(raw))
def test_any_bytes_give_text_or_the_error(data):
    try:
        text = midi_to_mtf(data, MOST)
    except DataError:
        return
    assert merged(mtf_to_midi(text))


@given(midi_files(), st.randoms(use_true_random=False))
def test_any_damage_gives_text_or_the_error(data, random):
    damaged = bytearray(data)
    for _ in range(random.randint(1, 4)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    try:
        mtf_to_midi(midi_to_mtf(bytes(damaged), MOST))
    except DataError:
        return


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "first line"),
        ("ticks_per_beat 0", "first line"),
        ("ticks_per_beat 480\nnote_on 0 0 60", "line 2"),
        ("ticks_per_beat 480\nnote_on 0 0 60 90\nnote_on -1 0 60 0", "line 3"),
        ("ticks_per_beat 480\nnote_on 0 0 60 128", "line 2"),
        ("ticks_per_beat 480\nnote_on 300000000 0 60 12", "line 2"),
        ("ticks_per_beat 480\nset_tempo 99999999 0", "line 2"),
        ("ticks_per_beat 480\nkey_signature H 0", "line 2"),
        ("ticks_per_beat 480\ntext hello 0", "no such message"),
    ],
)
def test_text_that_is_no_midi_says_which_line(text, reason):
    with pytest.raises(DataError, match=reason):
        mtf_to_midi(text)


@given(st.text("note_fcrmpgahl 0123456789-.\n") | st.text())
def test_any_text_gives_midi_or_the_error(text):
    try:
        mtf_to_midi(f"ticks_per_beat 480\n{text}")
    except DataError:
        return


@given(st.lists(NOTE, min_size=1, max_size=6), st.integers(2, 4))
def test_tracks_are_merged_in_their_order_at_each_tick(notes, count):
    tracks = [[note.copy(channel=i) for note in notes] for i in range(count)]
    channels = [line.split()[2] for line in midi_to_mtf(midi_bytes(*tracks), MOST).splitlines()[1:-1]]
    assert len(channels) == count * len(notes)
    if all(note.time for note in notes):
        assert channels == [str(i) for _ in notes for i in range(count)]


def test_the_order_of_tracks_is_kept_whatever_they_hold():
    rng = random.Random(0)
    tracks = [[mido.Message("note_on", note=i, velocity=1, time=rng.randint(0, 1)) for i in range(50)] for _ in "ab"]
    data = midi_bytes(*tracks)
    assert merged(mtf_to_midi(midi_to_mtf(data, MOST))) == merged(data)


def as_published(data: bytes) -> bytes:
    """MIDI text as CLaMP's converter makes it: all of mido's merged messages, words included, a line each."""
    file = mido.MidiFile(file=io.BytesIO(data))
    lines = [f"ticks_per_beat {file.ticks_per_beat}"]
    for message in file.merged_track:
        line = " ".join(map(str, message.dict().values()))
        lines.append(line.encode("unicode_escape").decode())
    return "\n".join(lines).encode()


@given(midi_files())
def test_midi_text_of_others_is_cleaned_to_ours(data):
    assert clean_mtf(as_published(data), MOST) == midi_to_mtf(data, MOST)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ticks_per_beat 480", "ticks 480", "the first line is 'ticks 480'"),
        ("note_on 0 0 60 90", "note_on 0 0 60", r"line 4, 'note_on 0 0 60', is no message"),
        ("note_on 0 0 60 90", "note_on 0 0 60 A Title 90", "is no message"),
        ("set_tempo 400000 0", "set_tempo The Irish Washerwoman", "line 2, 'set_tempo The"),
        ("note_on 0 0 60 90", "note_on 0 0 60 9999999999999", "is no message"),
    ],
)
def test_broken_midi_text_names_its_line(old, new, message):
    text = midi_to_mtf(melody(60, 62), MOST)
    assert old in text
    with pytest.raises(DataError, match=message):
        clean_mtf(text.replace(old, new).encode(), MOST)


def test_midi_text_without_notes_or_with_too_many_messages():
    text = midi_to_mtf(melody(60, 62), MOST)
    with pytest.raises(DataError, match="without notes"):
        clean_mtf(text.replace(" 90", " 0").encode(), MOST)
    with pytest.raises(DataError, match="more than 3 messages"):
        clean_mtf(text.encode(), 3)
    for nothing in (b"", b"\xff\xfe", b"ticks_per_beat 480"):
        with pytest.raises(DataError):
            clean_mtf(nothing, MOST)
    assert "Jig" not in clean_mtf(text.replace("set_tempo", "track_name The Jig 7\nset_tempo").encode(), MOST)
