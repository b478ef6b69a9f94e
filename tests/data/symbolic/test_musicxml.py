"""MusicXML becomes the ABC of the same notes; what means harm is refused before it is parsed."""

import io
import random
import tracemalloc
import zipfile
from fractions import Fraction

import lytk
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.symbolic.abc import clean_abc
from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.data.symbolic.musicxml import musicxml_to_abc
from muser_dist.errors import DataError
from tests.data.symbolic.notation import note, score

CONFIG = SymbolicConfig()
CONTAINER = '<container><rootfiles><rootfile full-path="{}"/></rootfiles></container>'


def convert(data: bytes | str, max_bytes: int = 1 << 20, max_elements: int = 10_000) -> str:
    return musicxml_to_abc(data.encode() if isinstance(data, str) else data, max_bytes, max_elements)


def clean(data: bytes | str) -> list[str]:
    return clean_abc(convert(data), CONFIG.headers).splitlines()


def packed(content: bytes, path: str = "score.xml", container: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **({"compression": zipfile.ZIP_DEFLATED} | options)) as archive:
        archive.writestr("META-INF/container.xml", CONTAINER.format(path) if container is None else container)
        archive.writestr(path, content)
    return file.getvalue()


TIED = '<tie type="{0}"/><notations><tied type="{0}"/></notations>'
TRIPLET = "<time-modification><actual-notes>3</actual-notes><normal-notes>2</normal-notes></time-modification>"


def test_notes_accidentals_ties_chords_and_rests():
    first = [note("F#4"), note("F4", 4), note("Bb4", 4), note("C5", 8, TIED.format("start")), note("", 8)]
    second = [note("C5", 24), note("G4"), note("B4").replace("<pitch>", "<chord/><pitch>")]
    assert clean(score([first, second])) == [
        "M:4/4",
        "L:1/8",
        "K:G clef=treble",
        "F2 =F_B c2- z2|",
        "c6 [GB]2|",
    ]


def test_triplets_are_triplets():
    triplet = "".join(note(pitch, 4, TRIPLET) for pitch in ("C5", "D5", "E5"))
    rest = "<note><rest/><duration>36</duration><type>half</type><dot/></note>"
    assert clean(score([[triplet, rest]]).replace("<divisions>8", "<divisions>12"))[-1] == "(3:2:3 cde z6|"


def test_parts_become_voices_bar_by_bar():
    lines = clean(score([[note("C5", 32)], [note("D5", 32)]], [[note("C3", 32)], [note("D3", 32)]]))
    assert lines[-2:] == ["[V:1]c8|[V:2]C,8|", "[V:1]d8|[V:2]D,8|"]


def test_no_word_gets_through():
    words = (
        '<identification><creator type="composer">Someone Somewhere</creator></identification>'
        "<credit><credit-words>Wistful</credit-words></credit>"
    )
    direction = "<direction><direction-type><words>Brindle</words></direction-type></direction>"
    lyric = "<lyric><text>Brindle</text></lyric>"
    text = clean_abc(
        convert(score([[direction, note("C5", 32, lyric)]], extra=words)), CONFIG.headers, instruments=False
    )
    assert text == "M:4/4\nL:1/8\nK:G clef=treble\nc8|\n"


@pytest.mark.parametrize(
    "text",
    [
        "Fast\nand loud",
        "x&#10;K:D",
        "x&#13;&#10;C2 D2 E2|",
        "<![CDATA[x\nC D E]]>",
        'a "b|c" d',
        "&quot;",
        "100% [K:D]",
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        "<direction><direction-type><words>{}</words></direction-type></direction>",
        "<direction><direction-type><rehearsal>{}</rehearsal></direction-type></direction>",
        "<lyric><text>{}</text></lyric>",
        "name",
        "title",
    ],
)
def test_no_text_breaks_out_of_its_place(place, text):
    """lytk writes texts into ABC as they are: what came after a line break was music, what it cut short was lost."""

    def music(text: str) -> str:
        inside = place.format(text)
        lyric, direction = (inside if place.startswith(f"<{name}") else "" for name in ("lyric", "direction"))
        first = [[note("C5", 16, lyric), direction, note("D5", 16)], [note("E5", 32)]]
        made = score(first, [[note("C3", 32)]], names=(text if place == "name" else "Flute",))
        made = made.replace("Wistful Brindle", text) if place == "title" else made
        return clean_abc(convert(made), CONFIG.headers, instruments=False)

    assert music(text) == music("x")
    assert music("x").endswith("[V:1]c4 d4|[V:2]C,8|\n[V:1]e8|\n")


def test_declared_defaults_of_attributes_are_not_read():
    """Each of many elements would have its own copy of them."""
    default = f'<!ATTLIST words font-family CDATA "{"x" * 100_000}">'
    text = SCORE.replace('"partwise.dtd">', f'"partwise.dtd" [{default}]>')
    many = text.replace(
        "<note>", "<direction><direction-type><words>x</words></direction-type></direction>" * 500 + "<note>"
    )
    tracemalloc.start()
    try:
        assert clean(many) == clean(SCORE)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


QUARTER = 480
"""Ticks of lytk's arrays."""

STEPS = st.sampled_from(
    [f"{step}{alter}{octave}" for step in "CDEFGAB" for alter in ("", "#", "b") for octave in "345"]
)


MEASURE = st.lists(STEPS | st.just(""), min_size=4, max_size=4)


@given(st.lists(st.lists(MEASURE, min_size=2, max_size=2), min_size=1, max_size=3))
def test_the_abc_sounds_as_the_score(parts):
    """Read back by another reader, that of ABC: the same pitches at the same times."""
    text = score(*[[[note(pitch) for pitch in measure] for measure in measures] for measures in parts])
    expected = sorted(
        (Fraction(4 * number + i), pitch)
        for measures in parts
        for number, measure in enumerate(measures)
        for i, pitch in enumerate(measure)
        if pitch
    )
    if not expected:
        with pytest.raises(DataError, match="without notes"):
            clean(text)
        return
    abc = clean_abc(convert(text), CONFIG.headers)
    heard = lytk.to_note_array(lytk.from_abc_string(f"X:1\nT:\n{abc}").to_music_document())
    assert sorted((Fraction(int(onset), QUARTER), int(pitch)) for onset, _, pitch, _ in heard) == sorted(
        (onset, midi_number(pitch)) for onset, pitch in expected
    )


def midi_number(pitch: str) -> int:
    base = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[pitch[0]]
    return 12 * (int(pitch[-1]) + 1) + base + pitch.count("#") - pitch.count("b")


SCORE = score([[note("C5", 32)]])


def test_packed_scores_and_other_encodings_are_read():
    assert convert(packed(SCORE.encode())) == convert(SCORE)
    assert convert(packed(SCORE.encode(), compression=zipfile.ZIP_STORED)) == convert(SCORE)
    assert convert(SCORE.replace("UTF-8", "UTF-16").encode("utf-16")) == convert(SCORE)


def entities(count: int) -> str:
    levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, count))
    return SCORE.replace('"partwise.dtd">', f'"partwise.dtd" [<!ENTITY e0 "ha">{levels}]>').replace(
        "Wistful", f"&e{count - 1};"
    )


HARMFUL = {
    "nothing": ("", "broken MusicXML"),
    "truncated": (SCORE[:-30], "broken MusicXML"),
    "another document": ("<html/>", "no MusicXML score"),
    "unknown encoding": (SCORE.replace("UTF-8", "klingon"), "broken MusicXML"),
    "entities": (entities(10), "declares entities"),
    "a file": (SCORE.replace('"partwise.dtd">', '"x" [<!ENTITY e SYSTEM "file:///etc/hosts">]>'), "declares entities"),
    "an address": (
        SCORE.replace('"partwise.dtd">', '"x" [<!ENTITY % e SYSTEM "http://localhost/">%e;]>'),
        "declares entities",
    ),
    "nested": ("<score-partwise>" + "<a>" * 100_000, "inside each other"),
    "elements": ("<score-partwise>" + "<a/>" * 100_000, "more than 10,000 elements"),
    "broken container": (packed(SCORE.encode(), container="<a>"), "broken MusicXML"),
    "no root file": (packed(SCORE.encode(), container="<a/>"), "broken .mxl"),
    "no such root file": (packed(SCORE.encode(), container=CONTAINER.format("other.xml")), "broken .mxl"),
    "unusual packing": (packed(SCORE.encode(), compression=zipfile.ZIP_LZMA), "does not know"),
    "truncated archive": (packed(SCORE.encode())[:-40], "broken .mxl"),
    "another name inside": (packed(SCORE.encode()).replace(b"score.xml", b"score.xmk", 1), "broken .mxl"),
    "zip bomb": (packed(b"<score-partwise>" + b" " * (64 << 20)), "more than 1,048,576 bytes"),
    "zip bomb as container": (packed(b"", container="<" * (64 << 20)), "more than 65,536 bytes"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_broken_or_means_harm_is_refused(name):
    data, reason = HARMFUL[name]
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=reason):
            convert(data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(DataError):
        convert(data)


@pytest.mark.parametrize("seed", range(200))
def test_any_damage_gives_abc_or_the_error(seed):
    rng = random.Random(seed)
    data = bytearray(rng.choice([SCORE.encode(), packed(SCORE.encode())]))
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        clean(bytes(data))
    except DataError:
        return


VALUES = ["0", "-1", "1e9", "999999999999", "", "x"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "element", ["divisions", "fifths", "beats", "beat-type", "line", "alter", "octave", "duration"]
)
def test_numbers_that_lie_give_abc_or_the_error(element, value):
    text = SCORE
    begin = text.index(f"<{element}>") + len(element) + 2
    text = text[:begin] + value + text[text.index("<", begin) :]
    try:
        assert len(convert(text)) < 1000
    except DataError:
        return
