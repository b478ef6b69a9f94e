"""Notation for tests: tunes, MIDI files by mido, scores, and strategies that draw them."""

import io

import mido
from hypothesis import strategies as st

WORDS = {"track_name", "text", "copyright", "lyrics", "marker", "instrument_name", "sysex"}

TUNE = """X:1
T:Wistful Brindle
C:Someone Somewhere
N:a remark
O:Ireland
R:hornpipe
Z:transcriber
M:6/8
L:1/8
Q:1/4=80 "Slowly"
P:ABA % plays again
K:E Minor % a comment
P:A
"Em"B|!trill!E>GE GEG|"^Segno"B>AB [CEG]2 f2|{ga}g>fe (3dgB|[r:remark]A>GA BG
w: lyr-ics to sing
W: more words
E|E>GE !D.C.! T.GEG|[K:G]B>AB [M:2/4]e2f|1 gfe dcB:|2 AGF E2|] % what a tune
"""


def midi_bytes(*tracks: list, ticks_per_beat: int = 480, kind: int = 1) -> bytes:
    file = io.BytesIO()
    mido.MidiFile(type=kind, ticks_per_beat=ticks_per_beat, tracks=[mido.MidiTrack(track) for track in tracks]).save(
        file=file
    )
    return file.getvalue()


def melody(*notes: int, program: int = 40) -> bytes:
    """Quarter notes, with a name and a tempo."""
    played = [
        message
        for note in notes
        for message in (
            mido.Message("note_on", note=note, velocity=90),
            mido.Message("note_off", note=note, velocity=64, time=480),
        )
    ]
    head = [
        mido.MetaMessage("track_name", name="Wistful Brindle"),
        mido.MetaMessage("set_tempo", tempo=400_000),
        mido.Message("program_change", program=program),
    ]
    return midi_bytes([*head, *played])


def _channel(name: str, /, **values: st.SearchStrategy[int]) -> st.SearchStrategy[mido.Message]:
    return st.builds(mido.Message, st.just(name), channel=st.integers(0, 15), time=TIMES, **values)


def _meta(name: str, /, **values: st.SearchStrategy) -> st.SearchStrategy[mido.MetaMessage]:
    return st.builds(mido.MetaMessage, st.just(name), time=TIMES, **values)


TIMES = st.one_of(st.just(0), st.integers(0, 1000), st.integers(0, 1 << 22))
BYTES = st.integers(0, 127)
MESSAGES = st.one_of(
    _channel("note_on", note=BYTES, velocity=BYTES),
    _channel("note_off", note=BYTES, velocity=BYTES),
    _channel("program_change", program=BYTES),
    _channel("control_change", control=BYTES, value=BYTES),
    _channel("polytouch", note=BYTES, value=BYTES),
    _channel("aftertouch", value=BYTES),
    _channel("pitchwheel", pitch=st.integers(-8192, 8191)),
    st.builds(mido.Message, st.just("sysex"), data=st.lists(BYTES, max_size=9).map(tuple), time=TIMES),
    _meta("set_tempo", tempo=st.integers(1, (1 << 24) - 1)),
    _meta(
        "time_signature",
        numerator=st.integers(1, 255),
        denominator=st.sampled_from([1, 2, 4, 8, 16, 32]),
        clocks_per_click=st.integers(0, 255),
        notated_32nd_notes_per_beat=st.integers(0, 255),
    ),
    _meta("key_signature", key=st.sampled_from(["C", "F#m", "Cb", "Ebm"])),
    _meta("smpte_offset", frame_rate=st.sampled_from([24, 25, 29.97, 30]), hours=st.integers(0, 23)),
    _meta("sequence_number", number=st.integers(0, 65535)),
    _meta("midi_port", port=st.integers(0, 255)),
    _meta("channel_prefix", channel=st.integers(0, 255)),
    *(_meta(name, text=st.text("words", max_size=9)) for name in ("text", "copyright", "lyrics", "marker")),
    *(_meta(name, name=st.text("words", max_size=9)) for name in ("track_name", "instrument_name")),
)
NOTE = _channel("note_on", note=BYTES, velocity=st.integers(1, 127))


@st.composite
def midi_files(draw: st.DrawFn) -> bytes:
    """Files of format 0 and 1 with at least one note."""
    kind = draw(st.integers(0, 1))
    tracks = draw(st.lists(st.lists(MESSAGES, max_size=12), min_size=1, max_size=1 if kind == 0 else 4))
    place = draw(st.integers(0, len(tracks[0])))
    tracks[0].insert(place, draw(NOTE))
    return midi_bytes(*tracks, ticks_per_beat=draw(st.integers(1, 32767)), kind=kind)


def score(*parts: list[list[str]], names: tuple[str, ...] = ("Flute", "Piano"), extra: str = "") -> str:
    """A MusicXML score in 4/4 at 8 divisions: of each part, the notes of each measure."""
    listed = "".join(
        f'<score-part id="P{i}"><part-name>{names[i % len(names)]}</part-name></score-part>' for i in range(len(parts))
    )
    written = "".join(
        f'<part id="P{i}">'
        + "".join(
            f'<measure number="{number}">{_ATTRIBUTES if number == 1 else ""}{"".join(notes)}</measure>'
            for number, notes in enumerate(measures, start=1)
        )
        + "</part>"
        for i, measures in enumerate(parts)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<!DOCTYPE score-partwise PUBLIC "-//Recordare//DTD MusicXML 3.1 Partwise//EN" "partwise.dtd">\n'
        f'<score-partwise version="3.1"><work><work-title>Wistful Brindle</work-title></work>{extra}'
        f"<part-list>{listed}</part-list>{written}</score-partwise>"
    )


_ATTRIBUTES = (
    "<attributes><divisions>8</divisions><key><fifths>1</fifths></key><time><beats>4</beats>"
    "<beat-type>4</beat-type></time><clef><sign>G</sign><line>2</line></clef></attributes>"
)
_TYPES = {2: "16th", 4: "eighth", 8: "quarter", 16: "half", 32: "whole"}


def note(pitch: str, duration: int = 8, inside: str = "") -> str:
    """A note such as "F#4" of so many 32nds, or a rest ("")."""
    if pitch:
        alter = f"<alter>{pitch.count('#') - pitch.count('b')}</alter>"
        what = f"<pitch><step>{pitch[0]}</step>{alter}<octave>{pitch[-1]}</octave></pitch>"
    else:
        what = "<rest/>"
    dotted = duration % 3 == 0
    kind = _TYPES[duration * 2 // 3 if dotted else duration]
    return f"<note>{what}<duration>{duration}</duration><type>{kind}</type>{'<dot/>' if dotted else ''}{inside}</note>"
