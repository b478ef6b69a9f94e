"""Writes tracks as WebDataset shards, in parallel on Ray; a call that was interrupted can be repeated.

    <split>-00000.tar   <key>.<extension> (the bytes as they are) of each file of a track, and its <key>.json
    muser-index.json    the number of tracks in each shard
    muser-corpus.json   a hash of what the shards were planned from
    skipped.jsonl       the tracks that are in no shard, and files that others lack there, and why

A shard that lacks a track which skipped.jsonl does not name is damaged, and a repeated call makes it anew.

Tracks are shuffled: corpora are sorted by genre, artist or album, and training shuffles inside a
window of a few shards only. In order, a batch would hold one genre, whose clips are poor negatives
for each other, and the first rows, which evaluation takes, would be no sample of the whole.
"""

import contextlib
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions

from muser_dist.data import audio
from muser_dist.data.session import connected
from muser_dist.data.shards import SIDECAR
from muser_dist.data.symbolic import members
from muser_dist.data.tar import MAX_MEMBER_BYTES, walk
from muser_dist.errors import ClusterError, DataError
from muser_dist.files import alone_in, remove_parts, whole_file, write_whole

MANIFEST = "muser-corpus.json"
SKIPPED = "skipped.jsonl"

EXTENSIONS = frozenset((*audio.EXTENSIONS, *(name for names in members.EXTENSIONS.values() for name in names)))
"""Of the files that shards take: sound and notation."""

_NAME_BYTES = 200  # of a key; file systems take 255 for the name with its extension


@dataclass(frozen=True)
class Track:
    """One row of the corpus.

    Attributes:
        key: names it among all tracks; made safe and unique as a file name when it is written.
        file: the audio or the notation, as it is encoded.
        metadata: fields for templates, as JSON values; what JSON lacks is written as its str().
        split: "train", "val" or "test".
        problem: why it cannot be a row, as far as its reader knows; it is listed as skipped then.
        further: other files of the same piece, such as its MIDI beside a score. Those that cannot be used, or have the
            extension of one before, are listed, and the track is written without them.
        content: of `file`, where it is none of its own but lies inside a file of the corpus; its name says where then.
    """

    key: str
    file: Path
    metadata: dict[str, Any]
    split: str = "train"
    problem: str | None = None
    further: tuple[Path, ...] = ()
    content: bytes | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.file, *self.further)


@dataclass(frozen=True)
class Written:
    """What `write_tracks` made.

    Attributes:
        rows: tracks by the name of their shard, in order.
        skipped: tracks that are in no shard; skipped.jsonl names them.
        left_out: files that tracks which are in a shard lack there; skipped.jsonl names these too.
    """

    rows: dict[str, int]
    skipped: int
    left_out: int


def write_tracks(
    folder: Path,
    tracks: Sequence[Track],
    shard_rows: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Writes all shards that are not there yet, their index and the list of skipped tracks.

    Each shard is one Ray task, on the cluster that RAY_ADDRESS names or on this machine's cores.
    On a cluster, every node must see the files and the folder under the same path.

    Args:
        folder: where they go; made when missing.
        tracks: the corpus. What has a problem, no file, no bytes or none of `EXTENSIONS` is skipped.
        shard_rows: tracks in a shard; the last one of a split has fewer.
        seed: decides the order.
        progress: called with (tracks done, tracks), first when the kept shards are known.

    Raises:
        DataError: no track can be written, or the folder holds another corpus or another job works in it.
        ConfigError: the folder cannot be written.
        ClusterError: no Ray cluster answers at RAY_ADDRESS.
    """
    if shard_rows < 1:
        raise DataError(f"shard_rows is {shard_rows}; a shard holds at least one track")
    folder = folder.absolute()  # tasks run in other working directories
    checked, lacking = _check(_with_unique_keys(tracks))
    usable = [track for track in checked if track.problem is None]
    if not usable:
        first = f", the first ({checked[0].file}) because: {checked[0].problem}" if checked else ""
        raise DataError(f"none of {len(checked)} tracks can be written{first}")
    shards = _plan(usable, shard_rows, seed)
    try:
        with alone_in(folder):
            _claim(folder, usable, shard_rows, seed)
            remove_parts(folder)
            there = {name for name in shards if (folder / name).exists()}
            done = sum(len(shards[name]) for name in there)
            report = progress or (lambda done, total: None)
            report(done, len(usable))
            results: dict[str, list[Track]] = {}
            for name, skipped in _write_on_ray(folder, shards):
                results[name] = skipped
                with (folder / SKIPPED).open("a") as file:  # at once, for `_lacking` of a call that goes on
                    file.write(_lines(skipped, []))
                if name not in there:
                    done += len(shards[name])
                    report(done, len(usable))
            remove_parts(folder)  # of tasks that died, and that Ray began again
            skipped = [track for track in checked if track.problem is not None]
            skipped += [track for name in shards for track in results[name]]
            write_whole(folder / SKIPPED, _lines(skipped, lacking))
            rows = {name: len(shards[name]) - len(results[name]) for name in shards}
            _write_index(folder, rows)
    except OSError as error:
        raise DataError(f"cannot write shards to {folder}: {error.strerror or error}") from None
    return Written(rows, len(skipped), len(lacking))


def write_index(folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Counts the rows of all shards in a folder of this machine and writes their index.

    Args:
        folder: holds the shards, *.tar.
        progress: called with (shards done, shards).

    Returns:
        rows by the name of the shard.

    Raises:
        DataError: there is no shard, one is damaged, or the folder cannot be read or written.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no shard (*.tar)")
    rows = {}
    try:
        with ThreadPoolExecutor(8) as pool:
            for path, keys in zip(paths, pool.map(_keys, paths), strict=True):
                rows[path.name] = len(keys)
                if progress is not None:
                    progress(len(rows), len(paths))
        _write_index(folder, rows)
    except OSError as error:
        raise DataError(f"cannot index {folder}: {error}") from None
    return rows


def _write_index(folder: Path, rows: dict[str, int]) -> None:
    write_whole(folder / SIDECAR, json.dumps({"format": 1, "rows": rows}, indent=1))


def _keys(shard: Path) -> list[str]:
    try:
        with shard.open("rb") as file:
            return [sample.key for sample in walk(file)]
    except DataError as error:
        raise DataError(f"{shard} {error}; take it away or make it anew") from None


# --- The plan ---


def _with_unique_keys(tracks: Sequence[Track]) -> list[Track]:
    """Keys become names without dots, slashes or anything else a file system minds; doubles are numbered."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    named = []
    for track in tracks:
        stem = re.sub(r"[^\w-]+", "_", track.key).strip("_") or "track"
        stem = stem.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore")
        key = stem
        while key in taken:
            repeats[stem] += 1
            key = f"{stem}-{repeats[stem] + 1}"
        taken.add(key)
        file, *further = (file.absolute() for file in track.files)
        named.append(replace(track, key=key, file=file, further=tuple(further)))
    return named


_Lacking = tuple[str, Path, str | None]
"""Key of a track, a file that it is written without, and why."""


def _check(tracks: list[Track]) -> tuple[list[Track], list[_Lacking]]:
    """The tracks with the files that can be used, or what is wrong with them; and the files that are left out.

    Threads, because a network file system answers slowly.
    """
    checked: list[Track] = []
    lacking: list[_Lacking] = []
    with ThreadPoolExecutor(16) as pool:
        for track, problems in zip(tracks, pool.map(_file_problems, tracks), strict=True):
            good = [file for file, problem in zip(track.files, problems, strict=True) if problem is None]
            if track.problem is not None or not good:
                checked.append(replace(track, problem=track.problem or problems[0]))
                continue
            content = track.content if problems[0] is None else None
            checked.append(replace(track, file=good[0], further=tuple(good[1:]), content=content))
            lacking += [(track.key, f, problem) for f, problem in zip(track.files, problems, strict=True) if problem]
    return checked, lacking


def _file_problems(track: Track) -> list[str | None]:
    """What is wrong with each file of a track that its reader found nothing wrong with."""
    problems: list[str | None] = [track.problem] * len(track.files)
    taken: set[str] = set()
    for i, file in enumerate(track.files if track.problem is None else ()):
        problems[i] = _file_problem(file, track.content if i == 0 else None)
        if problems[i] is None and _extension(file) in taken:
            problems[i] = f"is a second .{_extension(file)} of its track"
        elif problems[i] is None:
            taken.add(_extension(file))
    return problems


def _file_problem(file: Path, content: bytes | None) -> str | None:
    if _extension(file) not in EXTENSIONS:
        return f"is neither audio nor notation by its extension ({', '.join(sorted(EXTENSIONS))})"
    try:
        size = file.stat().st_size if content is None else len(content)
    except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if content is None and not file.is_file():
        return "is no file"
    if size == 0:
        return "is empty"
    if size > MAX_MEMBER_BYTES:
        return f"has {size:,} bytes; rows of more than {MAX_MEMBER_BYTES:,} are not read"
    return None


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()


def _plan(tracks: list[Track], shard_rows: int, seed: int) -> dict[str, list[Track]]:
    """The tracks of each shard, by its name."""
    shards = {}
    for split in sorted({track.split for track in tracks}):
        mine = [track for track in tracks if track.split == split]
        order = np.random.default_rng(seed).permutation(len(mine))
        for number, start in enumerate(range(0, len(mine), shard_rows)):
            shards[f"{split}-{number:05d}.tar"] = [mine[i] for i in order[start : start + shard_rows]]
    return shards


def _claim(folder: Path, tracks: list[Track], shard_rows: int, seed: int) -> None:
    """Makes the folder this corpus's, or raises DataError where it is another's."""
    digest = hashlib.sha256(f"{shard_rows} {seed}\n".encode())
    for track in tracks:
        row = [track.key, *map(str, track.files), track.split]
        digest.update(json.dumps(row).encode() + _encode_metadata(track) + (track.content or b"") + b"\n")
    content = json.dumps({"format": 1, "tracks": len(tracks), "plan": digest.hexdigest()}) + "\n"
    manifest = folder / MANIFEST
    folder.mkdir(parents=True, exist_ok=True)
    if not manifest.exists():
        if strangers := sorted(folder.glob("*.tar")):
            raise DataError(f"{strangers[0]} was there before; choose another folder, or move it away")
        write_whole(manifest, content)
    elif manifest.read_text(errors="replace") != content:
        raise DataError(
            f"{folder} holds shards of another corpus: tracks, their files or options changed since {MANIFEST} was "
            f"written. Choose another folder, or delete this one to make it anew"
        )


# --- The shards ---


def _write_on_ray(folder: Path, shards: dict[str, list[Track]]) -> Iterator[tuple[str, list[Track]]]:
    """Yields what `_write_shard` returned for each shard, after its name, in the order in which they end."""
    with connected():
        task = ray.remote(_write_shard)
        running = {task.remote(folder / name, tracks): name for name, tracks in shards.items()}
        try:
            while running:
                (ended,), _ = ray.wait(list(running), num_returns=1)
                name = running.pop(ended)
                try:
                    skipped = ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise ClusterError(f"the task that writes {name} died: {error}") from None
                yield name, skipped
        finally:  # after an error or Ctrl-C, a cluster that goes on must not
            for left in running:
                ray.cancel(left)


def _write_shard(path: Path, tracks: list[Track]) -> list[Track]:
    """Writes one shard, unless it is there. Returns the tracks that it lacks, because their files could not be read."""
    if path.exists() and (lacking := _lacking(path, tracks)) is not None:
        return lacking
    skipped = []
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for track in tracks:
            try:
                # Whole, so that a file that breaks off leaves no half member behind.
                contents = {_extension(file): file.read_bytes() for file in track.files[track.content is not None :]}
            except OSError as error:
                skipped.append(replace(track, problem=f"cannot be read: {error.strerror or error}"))
                continue
            if track.content is not None:
                contents[_extension(track.file)] = track.content
            _add_sample(tar, track.key, contents | {"json": _encode_metadata(track)})
    return skipped


def _add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Adds the members of a key, by extension. Equal content makes equal bytes: no times, no owners."""
    for extension, content in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(content)
        info.uname = info.gname = "muser"
        tar.addfile(info, io.BytesIO(content))


def _encode_metadata(track: Track) -> bytes:
    return json.dumps(track.metadata, default=str).encode()


def _lacking(path: Path, tracks: list[Track]) -> list[Track] | None:
    """The tracks that an existing shard was written without; None where it is damaged: it lacks others.

    Raises:
        DataError: it is not the one planned, or cannot be read.
    """
    keys = set(_keys(path))
    lacking = [track for track in tracks if track.key not in keys]
    if len(keys) + len(lacking) != len(tracks):
        raise DataError(f"{path} has other tracks than this corpus; delete it and it is made anew")
    told = _told(path.parent) if lacking else {}
    known = [replace(track, problem=told.get((track.key, str(track.file)))) for track in lacking]
    return known if all(track.problem is not None for track in known) else None


# --- The list of what was skipped ---


def _lines(skipped: list[Track], lacking: list[_Lacking]) -> str:
    told = [(track.key, track.file, track.problem) for track in skipped] + lacking
    lines = [{"key": key, "file": str(file), "reason": reason} for key, file, reason in told]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _told(folder: Path) -> dict[tuple[str, str], str]:
    """What a folder's list says: the reason by key and file. A line that broke off when a call died says nothing."""
    told = {}
    path = folder / SKIPPED
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            told[line["key"], line["file"]] = line["reason"]
    return told
