"""MusicXML, plain or packed (.mxl), to ABC.

The lytk package does it. What it cannot be trusted with is looked at before: entities, which may stand for gigabytes,
deep nesting, and archives that unpack to more than they should. It reads a copy, of elements, attributes and texts
alone, because it writes texts into ABC as they are: a line that a text ended would be music, or music would be lost.
"""

import io
import zipfile
from collections.abc import Callable
from xml.parsers import expat

from muser_dist.errors import DataError

_DEEPEST = 64
"""Elements inside each other; scores have about ten."""

_PLAIN = str.maketrans(
    {code: " " for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}  # what ends a line, or controls something
    | {'"': "'", "%": " ", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)
"""What becomes of characters of texts, and of values of attributes: in ABC none ends a line or a string, or begins a
comment."""

_CONTAINER = "META-INF/container.xml"
_CONTAINER_BYTES = 1 << 16


def musicxml_to_abc(data: bytes, max_bytes: int, max_elements: int) -> str:
    """A score in ABC, words and all; `abc.clean_abc` takes them out.

    Each staff becomes a voice. A staff's own voices share its bars, divided by "&".

    Args:
        data: the file, plain or packed.
        max_bytes: most bytes of what is packed.
        max_elements: most XML elements.

    Raises:
        DataError: it is no score, is broken, or larger than that; or declares entities.
    """
    if data.startswith(b"PK"):
        data = _unpack(data, max_bytes)
    copy = _copy(data, max_elements)
    import lytk  # native code of some megabytes, which only MusicXML needs

    try:
        return lytk.to_abc(lytk.from_musicxml_bytes(copy))
    except Exception as error:  # whatever it is, one row must not end the run
        raise DataError(f"broken MusicXML: {error}") from None


def _copy(data: bytes, max_elements: int) -> bytes:
    """A score without declarations and comments, in UTF-8, its texts plain; errors as of `musicxml_to_abc`."""
    copy = io.StringIO()

    def begin(name: str, attributes: dict[str, str]) -> None:
        if not copy.tell() and name not in ("score-partwise", "score-timewise"):
            raise DataError(f"no MusicXML score: its element is {name[:40]!r}")
        values = "".join(f' {key}="{value.translate(_PLAIN)}"' for key, value in attributes.items())
        copy.write(f"<{name}{values}>")

    _walk(
        data,
        max_elements,
        begin,
        lambda name: copy.write(f"</{name}>"),
        lambda text: copy.write(text.translate(_PLAIN)),
    )
    return copy.getvalue().encode()


def _walk(
    data: bytes,
    max_elements: int,
    visit: Callable[[str, dict[str, str]], object],
    leave: Callable[[str], object] = lambda _: None,
    text: Callable[[str], object] | None = None,
) -> None:
    """Visits the elements in their order, by name and attributes, and their texts; errors as of `musicxml_to_abc`."""
    depth = count = 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > _DEEPEST:
            raise DataError(f"MusicXML with more than {_DEEPEST} elements inside each other")
        if count > max_elements:
            raise DataError(f"MusicXML of more than {max_elements:,} elements (data.symbolic.max_events)")
        visit(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        leave(name)

    def refuse(*_: object) -> None:
        raise DataError("MusicXML that declares entities")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.specified_attributes = True  # a default may be long, and stand for each of many elements
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = begin, end, text
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except DataError:
        raise
    except Exception as error:  # expat's own, and of codecs that XML names
        raise DataError(f"broken MusicXML: {error}") from None


def _unpack(data: bytes, max_bytes: int) -> bytes:
    """The score in an archive: the first root file that its container names."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        paths: list[str] = []
        _walk(
            _member(archive, _CONTAINER, _CONTAINER_BYTES),
            _CONTAINER_BYTES,
            lambda name, attributes: paths.append(attributes["full-path"]) if name == "rootfile" else None,
        )
        return _member(archive, paths[0], max_bytes)
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and struct have many
        raise DataError(f"broken .mxl: {type(error).__name__}: {error}") from None


def _member(archive: zipfile.ZipFile, path: str, max_bytes: int) -> bytes:
    member = archive.getinfo(path)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"broken .mxl: {path[:40]} is packed in a way that MusicXML does not know")
    with archive.open(member) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(f"an .mxl whose {path[:40]} has more than {max_bytes:,} bytes")
    return content
