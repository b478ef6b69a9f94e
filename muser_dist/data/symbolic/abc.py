"""ABC notation, cleaned of words and with its voices interleaved bar by bar.

The result is that of CLaMP 2 (arXiv 2410.13267, section 3.1), in one form for all sources: the header lines, then one
line for each bar, in which every voice's part begins with [V:number] when there are several.

    M:3/4
    K:D
    V:1 treble
    V:2 bass
    [V:1]d2 f2 a2|[V:2]D6|
    [V:1][K:G]g6:|[V:2]G,6:|

A rest of several bars (Z4, X4) stands in the line of its first, and the voice's next bar so many lines later; bars that
all voices rest through have no line.

What the notation does not know, and what may hold words, is left out: free text, comments, directives, lyrics, remarks,
annotations. Of quoted strings only chord symbols are left, of !decorations! only the standard's own (ABC 2.1).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from string import ascii_letters

from muser_dist.data.symbolic.patches import to_ascii
from muser_dist.errors import DataError

_FIELD = re.compile(r"([A-Za-z+]):(.*)", re.DOTALL)
_MUSIC_NOT_FIELD = re.compile(r"[A-Ga-gxz]:[|:]")
"""A line that begins so is a note and a repeat."""

_REST_OF_BARS = re.compile("[XZ]([0-9]*)")

_COMMENT = re.compile(r"(?<!\\)%.*")

_IN_MUSIC = "KLMPQ"
"""Fields that may change in the music."""

_DECORATION = r"""
      trill[()]? | (?:upper|lower)?mordent | pralltriller | roll | (?:inverted)?turnx? | arpeggio | snap | slide | wedge
    | > | accent | emphasis | marcato | \^ | tenuto | staccato | (?:inverted)?fermata | breath | \+ | plus
    | [0-5] | upbow | downbow | open | thumb | p{1,4} | m[pf] | f{1,4} | sfz
    | (?:crescendo|diminuendo|<|>)[()] | (?:short|medium|long)phrase | segno | coda | D\.[SC]\. | dacoda | dacapo | fine
"""
"""The standard's decorations; their names are no words of the tune's own."""

_NOTE = r"(?:\^{1,2}|_{1,2}|=)?[A-Ga-g][,']*[0-9/]{0,16}"

_TOKEN = re.compile(
    rf"""
      (?P<string>"[^"]*"?)                                  # an unclosed one takes the rest of the line, as do others
    | (?P<comment>%.*)
    | (?P<field>\[[A-Za-z]:[^\]]*\]?)
    | [!+](?P<decoration>{_DECORATION})[!+] | (?P<words>![^!|]{{1,40}}!)
    | \+(?P<chord>(?:{_NOTE}){{2,16}})\+                       # as it was written before ABC 1.6
    | (?P<bar>\.?:*\[?\|[|\]:]*|::+)(?P<number>[0-9][0-9,-]*)?
    | (?P<ending>\[[0-9][0-9,-]*)
    | (?P<note>{_NOTE}|[xzXZ][0-9/]{{0,16}})
    | (?P<mark>\([2-9](?::[0-9]?){{0,2}}|\][0-9/]{{0,16}}|\{{/|[()\[{{}}<>.~&HLMOPSTuv-])
    | (?P<space>\s+|y[0-9]*)
    | (?P<other>.)
    """,
    re.VERBOSE,
)
_LETTER = re.compile("[A-Za-z]")
_NO_NOTATION = frozenset(ascii_letters) - frozenset("ABCDEFGabcdefgHLMOPSTuvxyzXZ")
_CHORD_SYMBOL = re.compile(
    r"[A-G][#b]?(?:maj|min|dim|aug|sus|add|[mM]|[#b+-]?[0-9]{1,2}|[+-]){0,5}(?:/[A-G][#b]?)?", re.ASCII
)
_KEY = re.compile(r"([A-G][#b]?)\s*([A-Za-z]*)", re.ASCII)
_NO_KEY = re.compile(r"HP|Hp|none")  # of bagpipes, or none
_MODES = {"maj": "", "ion": "", "min": "m", "aeo": "m", **{mode: mode for mode in ("dor", "phr", "lyd", "mix", "loc")}}
_CLEF = re.compile(
    r"(?:clef=)?(?:treble|alto|tenor|bass|mezzo|soprano|baritone|perc|none|[GFC])[1-5]?(?:[+-]8)?|"
    r"(?:octave|transpose)=-?[0-9]{1,2}|middle=[A-Ga-g][,']*|exp|[_=^]{1,2}[A-Ga-g]"
)
_NAME = re.compile(r'\b(name|nm|subname|sname|snm)=(?:"([^"]*)"|(\S+))')

_VALUES = {
    "L": re.compile(r"[0-9]{1,3}(?:/[0-9]{1,4})?"),
    "M": re.compile(r"C\|?|none|[0-9+()./ ]{1,32}"),
    "Q": re.compile(r"[0-9/ ]*=? *[0-9.]{1,8}"),
    "P": re.compile(r"[A-Z][A-Z0-9.() ]*"),
}
"""What the values of fields may be; anything else may be words."""

_LONGEST_VALUE = 100


def clean_abc(data: bytes | str, headers: Collection[str], instruments: bool = True) -> str:
    """The music of the first tune of an ABC file, without words, its voices interleaved.

    Args:
        data: the file: UTF-8, or Latin-1 where it is none.
        headers: fields that are left, in the music too; other fields are dropped.
        instruments: whether the names of voices are left (where headers has V).

    Returns:
        ASCII. Voices, and parts (P:), are called by their number and letter in the order in which they come.

    Raises:
        DataError: it has no key (K:), which every tune must have, or no note.
    """
    tune = _Tune(headers, instruments)
    for line in re.split(r"\r\n?|\n", data if isinstance(data, str) else _decode(data)):
        if not tune.read(line):
            break
    return tune.write()


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


@dataclass
class _Voice:
    """A voice: what is said about it, its bars and their places, and the bar that is being read and how many it rests.

    Places are numbers, not lists with room for all: a rest may last for more bars than memory holds.
    """

    number: int
    settings: str = ""
    bars: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    place: int = 0
    bar: list[str] = field(default_factory=list)
    sounding: bool = False
    rests: int = 0

    def end_bar(self, line: str) -> None:
        """Ends the bar with a bar line; what has no note or rest goes to the next one, or is nothing."""
        if self.sounding:
            self.bars.append("".join(self.bar).strip() + line)
            self.places.append(self.place)
            self.place += max(1, self.rests)
            self.bar.clear()
            self.sounding, self.rests = False, 0
        elif line != "|":
            self.bar.append(line)

    def end(self) -> list[str]:
        """All bars."""
        if self.sounding:
            self.end_bar("")
        rest = "".join(self.bar).strip()
        if rest and self.bars:  # the last bar lines
            self.bars[-1] += rest
        return self.bars


class _Tune:
    """Reads a tune line by line."""

    def __init__(self, headers: Collection[str], instruments: bool) -> None:
        self._headers = headers
        self._instruments = instruments
        self._lines: list[str] = []
        self._key: str | None = None
        self._voices: dict[str, _Voice] = {}
        self._parts: dict[str, str] = {}
        self._voice: _Voice | None = None
        self._notes = False

    def read(self, line: str) -> bool:
        """Takes a line in; returns whether the tune goes on."""
        match = _FIELD.match(line)
        if match and not (self._key is not None and _MUSIC_NOT_FIELD.match(line)):
            return self._read_field(match[1], _COMMENT.sub("", match[2]).strip())
        if self._key is not None:
            self._read_music(line)
        return True

    def _read_field(self, name: str, value: str) -> bool:
        if name == "X":
            if self._key is not None:
                return False  # the next tune
            self._lines.clear()  # what stood before it was the file's
        elif name == "V":
            self._change_voice(value)
        elif self._key is None:
            kept = self._value(name, value) if name in self._headers else ""
            if name == "K":
                self._key = f"K:{kept}" if kept else ""
            elif kept:
                self._lines.append(f"{name}:{kept}")
        elif name in _IN_MUSIC and name in self._headers and (kept := self._value(name, value)):
            self._now().bar.append(f"[{name}:{kept}]")
        return True

    def _value(self, name: str, value: str) -> str:
        """What of a field's value is notation; of fields that are no notation, all."""
        if name == "K":
            return _key(value)
        if name == "Q":
            value = re.sub(r'"[^"]*"?', "", value).strip()
        if name in _VALUES and not (len(value) <= _LONGEST_VALUE and _VALUES[name].fullmatch(value)):
            return ""
        if name == "P":
            return re.sub(r"[A-Z]", lambda letter: self._part(letter[0]), value)
        return value if name in _VALUES else to_ascii(value)

    def _part(self, letter: str) -> str:
        return self._parts.setdefault(letter, chr(ord("A") + len(self._parts)))

    def _change_voice(self, value: str) -> None:
        name, *settings = value.split(None, 1) or [""]
        voice = self._voices.setdefault(name, _Voice(len(self._voices) + 1))
        if not voice.settings and "V" in self._headers:
            voice.settings = self._settings(*settings)
        self._voice = voice

    def _settings(self, text: str = "") -> str:
        names = [
            f'{"nm" if key in ("name", "nm") else "snm"}="{to_ascii(quoted or plain).replace(chr(34), "").strip()}"'
            for key, quoted, plain in _NAME.findall(text)
            if self._instruments
        ]
        clefs = [word for word in _NAME.sub("", text).split() if _CLEF.fullmatch(word)]
        return " ".join([*clefs, *names])

    def _now(self) -> _Voice:
        """The voice that is being read."""
        if self._voice is None:
            self._change_voice("1")
        assert self._voice is not None
        return self._voice

    def _read_music(self, line: str) -> None:
        if _is_prose(line):
            return
        for token in _TOKEN.finditer(line):
            kind, text = token.lastgroup, token[0]
            if kind == "field":
                if text.endswith("]"):
                    self._read_field(text[1], text[3:-1].strip())
            elif kind in ("bar", "number"):
                voice = self._now()
                voice.end_bar(token["bar"])
                if token["number"]:
                    voice.bar.append(f"[{token['number']}")
            elif kind == "space":
                bar = self._now().bar
                if bar and bar[-1] != " ":
                    bar.append(" ")
            elif kept := _notation(token):
                voice = self._now()
                voice.bar.append(kept)
                voice.sounding |= kind in ("note", "chord")
                if rest := _REST_OF_BARS.fullmatch(text):
                    voice.rests += int(rest[1] or 1)
                self._notes |= kind == "chord" or (kind == "note" and text[0] not in "xzXZ")

    def write(self) -> str:
        """The tune; errors as of `clean_abc`."""
        if self._key is None:
            raise DataError("no ABC: it has no key (K:)")
        if not self._notes:
            raise DataError("ABC without notes")
        voices = [(voice, bars) for voice in self._voices.values() if (bars := voice.end())]
        lines = [*self._lines, *([self._key] if self._key else [])]
        rows: dict[int, list[str]] = defaultdict(list)
        several = len(voices) > 1
        for voice, bars in voices:
            if "V" in self._headers and (several or voice.settings):
                lines.append(f"V:{voice.number} {voice.settings}".strip())
            for place, bar in zip(voice.places, bars, strict=True):
                rows[place].append(f"[V:{voice.number}]{bar}" if several else bar)
        return "\n".join([*lines, *("".join(rows[place]) for place in sorted(rows)), ""])


def _is_prose(line: str) -> bool:
    """Whether a line is free text: it has several letters, and often, that are no notation. One may be a symbol."""
    if len(_NO_NOTATION.intersection(line)) < 3:
        return False  # most lines, at once
    counts = Counter(token[0] for token in _TOKEN.finditer(line) if token.lastgroup in ("note", "mark", "other"))
    unknown = {text: count for text, count in counts.items() if text in _NO_NOTATION}
    known = sum(count for text, count in counts.items() if text not in unknown and _LETTER.search(text))
    return len(unknown) > 2 and 3 * sum(unknown.values()) > known


def _notation(token: re.Match[str]) -> str:
    """A token as it is kept; "" where it may be words, or nothing that notation knows."""
    kind = token.lastgroup
    if kind in ("note", "mark", "ending"):
        return token[0]
    if kind == "string" and _CHORD_SYMBOL.fullmatch(token[0][1:-1]) and token[0].endswith('"'):
        return token[0]
    if kind == "chord":
        return f"[{token[kind]}]"
    if kind == "decoration":
        return f"!{token[kind]}!"
    return ""


def _key(value: str) -> str:
    """A key in its shortest form, with its accidentals and clef."""
    if match := _KEY.match(value):
        mode = _MODES.get(match[2][:3].lower())
        if match[2] == "m":
            mode = "m"
        key, rest = match[1] + (mode or ""), value[match.start(2) if mode is None else match.end() :]
    elif match := _NO_KEY.match(value):
        key, rest = match[0], value[match.end() :]
    else:
        key, rest = "", value
    return " ".join([*([key] if key else []), *(word for word in rest.split() if _CLEF.fullmatch(word))])
