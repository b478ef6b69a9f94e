import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from muser_dist.data.symbolic.abc import clean_abc
from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.errors import DataError
from tests.data.symbolic.notation import TUNE

HEADERS = SymbolicConfig().headers


def clean(text: str, headers=HEADERS, instruments: bool = True) -> str:
    return clean_abc(text.encode(), headers, instruments)


def music(text: str) -> list[str]:
    return clean(f"K:C\n{text}").splitlines()[1:]


def test_a_tune_becomes_its_headers_and_a_line_for_each_bar():
    assert clean(TUNE).splitlines() == [
        "M:6/8",
        "L:1/8",
        "Q:1/4=80",
        "P:ABA",
        "K:Em",
        '[P:A]"Em"B|',
        "!trill!E>GE GEG|",
        "B>AB [CEG]2 f2|",
        "{ga}g>fe (3dgB|",
        "A>GA BGE|",
        "E>GE !D.C.! T.GEG|",
        "[K:G]B>AB [M:2/4]e2f|",
        "[1 gfe dcB:|",
        "[2 AGF E2|]",
    ]


def test_headers_that_are_not_wanted_are_dropped_in_the_music_too():
    text = clean(TUNE, headers=("L", "Q"))
    assert text.startswith("L:1/8\nQ:1/4=80\n ".strip())
    assert not re.search(r"[KMP]:", text)
    assert clean(TUNE, headers=("T", "K")).startswith("T:Wistful Brindle\nK:Em\n")


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("G", "G"),
        ("E Minor", "Em"),
        ("Em", "Em"),
        ("A mixolydian", "Amix"),
        ("Bb major", "Bb"),
        ("C#DOR", "C#dor"),
        ("D treble", "D treble"),
        ("D clef=bass-8 octave=-1", "D clef=bass-8 octave=-1"),
        ("Dmix=c", "Dmix =c"),
        ("D exp ^f _b", "D exp ^f _b"),
        ("HP", "HP"),
        ("none", "none"),
        ("G what a tune", "G"),
        ("wistful", None),
    ],
)
def test_keys_are_written_in_one_way_and_without_words(value, kept):
    assert clean(f"K:{value}\nA|") == (f"K:{kept}\n" if kept else "") + "A|\n"


@pytest.mark.parametrize(
    ("line", "bars"),
    [
        ("A B|c|", ["A B|", "c|"]),
        ("|: A B :|: c :|", ["|: A B:|:", "c:|"]),
        ("A||\n|: B", ["A||", "|: B"]),
        ("|A | | B|]", ["A|", "B|]"]),  # an empty bar is none
        ("A|\n:|", ["A|:|"]),
        ("A B\nc|d", ["A Bc|", "d"]),  # a bar does not end with its line
        ("A|1 B :|2 c ||", ["A|", "[1 B:|", "[2 c||"]),
        ("[1,3 A :|[2 B|]", ["[1,3 A:|", "[2 B|]"]),
        ("A2B3/2 c/ d// [CE]4 (3:2:2ab", ["A2B3/2 c/ d// [CE]4 (3:2:2ab"]),
        ("^^A,, __b'' =c _D x2 z Z4|", ["^^A,, __b'' =c _D x2 z Z4|"]),
        ("A`B y2 c*d$ \\", ["AB cd"]),
        ("A<B c>>d e-|e", ["A<B c>>d e-|", "e"]),
        ("A & B|", ["A & B|"]),
        ('"Am7/G"A "F#dim"B "C+"c "Cadenza"d "D.C."e', ['"Am7/G"A "F#dim"B "C+"c d e']),
        ("!f!A +trill+B !D.C. al fine!c +A3^CE2+", ["!f!A !trill!B c [A3^CE2]"]),
        ('"C°7"A "éa"B ¾c|', ["A B c|"]),
        ('A "unclosed B|', ["A"]),
        ('A "Cm', ["A"]),
        ("A|\nGather round and be glad\nB|", ["A|", "B|"]),  # free text
        ("kABc nBcd hcde defg|", ["ABc Bcd cde defg|"]),  # a few symbols of one's own are none
        ("A [N:unclosed B|", ["A"]),
        ("G:|A", ["G:|", "A"]),  # no field G
    ],
)
def test_bars(line, bars):
    assert music(line) == bars


@pytest.mark.parametrize(
    "body",
    [
        "V:tune\nA|B|\nV:low clef=bass\nC|D|\nV:tune\nc|\nV:low\nE|",
        "V:tune\nV:low clef=bass\n[V:tune]A|B|\n[V:low]C|D|\n[V:tune]c|\n[V:low]E|",
        "V:tune\nV:low clef=bass\n[V:tune]A|[V:low]C|\n[V:tune]B|[V:low]D|\n[V:tune]c|[V:low]E|",
    ],
)
def test_voices_are_interleaved_bar_by_bar_and_numbered(body):
    assert clean(f"K:C\n{body}") == "K:C\nV:1\nV:2 clef=bass\n[V:1]A|[V:2]C|\n[V:1]B|[V:2]D|\n[V:1]c|[V:2]E|\n"


def test_a_voice_that_is_shorter_ends():
    assert clean("K:C\nV:1\nA|B|\nV:2\nC|", headers=()) == "[V:1]A|[V:2]C|\n[V:1]B|\n"


def test_after_a_rest_of_several_bars_a_voice_stands_where_it_plays():
    body = "V:1\nZ2|A|B|\nV:2\nC|D|E|F|G|\nV:3\nc Z|X3|d|\nV:4\nZ9999999999999999|e|"
    assert clean(f"K:C\n{body}", headers=()).splitlines() == [
        "[V:1]Z2|[V:2]C|[V:3]c Z|[V:4]Z9999999999999999|",
        "[V:2]D|[V:3]X3|",
        "[V:1]A|[V:2]E|",
        "[V:1]B|[V:2]F|",
        "[V:2]G|[V:3]d|",
        "[V:4]e|",
    ]
    assert music("Z2|A|Z9999999999999999|B|Z0|c") == ["Z2|", "A|", "Z9999999999999999|", "B|", "Z0|", "c"]


def test_names_of_voices_are_left_only_with_the_instruments():
    text = 'K:C\nV:1 treble name="Flöte" snm="Fl." stem=up\nA|\nV:2 nm=Bass bass\nC|'
    assert clean(text).splitlines()[1:3] == ['V:1 treble nm="Flote" snm="Fl."', 'V:2 bass nm="Bass"']
    assert clean(text, instruments=False).splitlines()[1:3] == ["V:1 treble", "V:2 bass"]


def test_parts_are_lettered_in_their_order():
    assert clean("P:XYX\nK:C\nP:X\nA|\nP:Y\nB|\nP:Trio\nc|") == "P:ABA\nK:C\n[P:A]A|\n[P:B]B|\nc|\n"


def test_only_the_first_tune_is_read():
    assert clean("%abc\nT:File\n\nX:1\nM:C\nK:C\nA|\n\nX:2\nK:D\nB|") == "M:C\nK:C\nA|\n"


@pytest.mark.parametrize("text", ["", "A|B|", "T:No key\nABc|", "\x00\x01\xff", "%PDF-1.4 K:C"])
def test_what_has_no_key_is_no_abc(text):
    with pytest.raises(DataError, match="no key"):
        clean(text)


@pytest.mark.parametrize("text", ["K:C", "K:C\nz4|x|", "K:C\nw:A B C", "X:1\nK:C\nX:2\nABC|"])
def test_without_notes_it_is_an_error(text):
    with pytest.raises(DataError, match="without notes"):
        clean(text)


def test_other_encodings_and_line_ends_are_read():
    assert clean_abc("\ufeffT:é\r\nK:C\r\rA|\r\n".encode(), HEADERS) == "K:C\nA|\n"
    assert clean_abc("T:é\nK:C\nA|".encode("latin-1"), ("T",)) == "T:e\nA|\n"


# Letters that no note, rest, decoration or mode has.
WORD = st.text("ijklmnopqrstw", min_size=5, max_size=12).filter(lambda word: len(set(word)) > 2)
PLACES = [
    "T:{}", "C:{}", "N:{}", "% {}", "%%text {}", "w: {}", "W: {}", "+: {}", "I:{}", "U:n = {}", "s:{}", "{} {}", ":{}",
    'A "{}" B|', 'A "^{}"B|', 'A "C{}"B|', "A !{}! B|", "A +{}+ B|", "A [N:{}] B|", "A [r:{}] B|", "A B| % {}",
    "P:{}", "[P:{}]A|", "Q:{}", 'Q:"{}" 1/4=90', "K:G {}", "[K:{}]A|", "M:{}", "L:{}", "V:{}", "[V:{}]A|", "V:1 {}",
    'A "{}', "A [N:{}", "A [T:{}]|", "X {}",
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(PLACES), WORD), max_size=8), st.integers(0, 8), WORD)
def test_no_word_gets_through(places, key, word):
    lines = [place.replace("{}", word) for place, word in places]
    lines.insert(min(key, len(lines)), f"K:C {word}")
    text = clean("\n".join(["X:1", *lines, "ABc|"]), instruments=False)
    assert not [hidden for hidden in [word, *(hidden for _, hidden in places)] if hidden in text]
    assert not re.search("[ijklnopqrstw]", re.sub(r"!D\.C\.!|none", "", text))


CONTENTS = st.sampled_from(["A2 B", "[CE]2 z", "^f/g/ (3abc", '"Am"A', "!f!a'", "[M:3/4]c3"])
BARS = st.lists(st.tuples(CONTENTS, st.sampled_from(["|", "||", ":|", "|]"])), min_size=1, max_size=6)


@given(st.lists(BARS, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_interleaving_is_that_of_the_lists_of_bars(voices, random):
    """However the lines are cut and the voices take turns."""
    lines, left = [], {number: ["".join(bar) for bar in bars] for number, bars in enumerate(voices, start=1)}
    for number in left:
        lines.append(f"V:{number}")
    while any(left.values()):
        number = random.choice([number for number, bars in left.items() if bars])
        count = random.randint(1, len(left[number]))
        cut = "".join(left[number][:count])
        left[number] = left[number][count:]
        lines.append(f"V:{number}\n{cut}" if random.random() < 0.5 else f"[V:{number}]{cut}")
    rows = [
        "".join(f"[V:{n}]{''.join(bars[i])}" for n, bars in enumerate(voices, start=1) if i < len(bars))
        for i in range(max(map(len, voices)))
    ]
    expected = ["K:C", *(f"V:{n}" for n in range(1, len(voices) + 1)), *rows]
    assert clean("K:C\n" + "\n".join(lines)).splitlines() == expected


@given(st.text("ABcd|:[]1(){}<>^_=,'/23 zxZX\"!+.~TVKPM&\n-%\\°é") | st.text())
@example('V:1 nm="a" treble\nA|[V:2]B|[1C:|')
@example("[1]A|")
@example("V:1\nZ3|A|\nV:2\nB|Z2 X2|c|")
def test_any_music_cleaned_stays_as_it_is_when_cleaned_again(body):
    try:
        once = clean(f"K:C\n{body}")
    except DataError:
        return
    assert once.isascii()
    assert clean(once) == once
