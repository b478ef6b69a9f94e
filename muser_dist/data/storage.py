"""Where shards lie: local folders, or any fsspec URL, read through copies on the local disk.

A remote shard is fetched whole, in blocks; when the stream breaks, the next request asks for the
first byte that is missing. Its copy serves all tasks of the node and all passes over the data,
until the cache is full and it is the one not used for longest.
"""

import contextlib
import fnmatch
import glob
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import fsspec.asyn
from filelock import FileLock

from muser_dist.data.cache_folder import LOCKS, cache_folder, make_room
from muser_dist.data.config import DataConfig
from muser_dist.errors import ConfigError, DataError

BLOCK_BYTES = 8 << 20
"""Bytes asked for at a time."""

# Attempts in a row that may fail without a new byte. With the pauses between them (half of at most
# 0.25, 0.5, 1 ... 30 s on average) that is one to two minutes of outage.
_ATTEMPTS = 10
_LONGEST_PAUSE = 30.0

# Trying again does not mend these.
_PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)

_HOPELESS = ("NoCredentialsError", "ProfileNotFound", "PartialCredentialsError")  # botocore's, which may be absent


def _version(info: dict[str, Any]) -> list[str]:
    # Where there is an ETag, it says it all: some servers tell times in milliseconds when they list a folder, and in
    # seconds when they are asked for a file.
    tag = info.get("ETag") or info.get("etag")
    names = ("size",) if tag else ("LastModified", "Last-Modified", "mtime", "created", "size")
    return [str(tag), *(str(info.get(name)) for name in names)]


def redact(text: str) -> str:
    """The text without what may be secret in a URL: user, password and query string."""
    text = re.sub(r"(\w+://)[^/@\s'\"]*@", r"\1", text)
    return re.sub(r"(\w+://[^?\s'\"]*)\?[^\s'\")]*", r"\1", text)


def local_path(url: str) -> str | None:
    """The path of a shard that is read where it lies; None of one that is copied."""
    return url.removeprefix("file://") if "://" not in url or url.startswith("file://") else None


class Storage:
    """Access to shards.

    Args:
        options: arguments of fsspec's file systems, by protocol. They may be secret: they are
            neither printed nor saved.
        cache: folder for copies of remote shards.
        cache_bytes: size that the folder is kept below, as far as the shards in use allow.
        timeout: seconds after which a stalled read is broken off.
    """

    def __init__(self, options: dict[str, dict[str, Any]], cache: Path, cache_bytes: int, timeout: float) -> None:
        self._options = options
        self.cache = cache
        self.cache_bytes = cache_bytes
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Storage(cache={self.cache})"

    @staticmethod
    def of(config: DataConfig) -> "Storage":
        """The storage that a config describes.

        Raises:
            ConfigError: the file of data.storage_options cannot be used.
        """
        options: Any = {}
        if path := config.storage_options:
            try:
                options = json.loads(Path(path).read_text())
            except OSError as error:
                raise ConfigError(f"data.storage_options: cannot read {path}: {error.strerror}") from None
            except ValueError:  # its message may quote the file
                raise ConfigError(f"data.storage_options: {path} is no JSON") from None
            if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
                raise ConfigError(f'data.storage_options: {path} must hold {{"PROTOCOL": {{"ARGUMENT": value}}}}')
        return Storage(options, cache_folder(config), round(config.cache_gib * (1 << 30)), config.read_timeout)

    # --- Finding shards ---

    def expand(self, patterns: Iterable[str], setting: str) -> list[str]:
        """The shards that the patterns name, sorted.

        Args:
            patterns: paths or fsspec URLs with braces and globs.
            setting: the option that holds them, for errors.

        Raises:
            DataError: a pattern matches nothing or is malformed; the message names it.
        """
        # Only here: whoever searches embeddings or loads a model names no shards, and may not have it.
        from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

        urls: set[str] = set()
        folders: dict[str, set[str] | None] = {}  # each is listed once, however many shards are named in it
        for pattern in patterns:
            if re.match(r"\w+://[^/]*:[^/]*@|https?://[^?]*\?", pattern):
                raise DataError(
                    f"{setting}: {redact(pattern)} holds a password or a query, which would be saved with the run; "
                    "give what grants access in the file of --data.storage-options"
                )
            try:
                expanded = list(braceexpand(pattern))
            except UnbalancedBracesError:
                raise DataError(f"{setting}: the braces in {pattern!r} are not balanced") from None
            for url in expanded:
                urls.update(self._matches(url, setting, folders))
        return sorted(urls)

    def _matches(self, url: str, setting: str, folders: dict[str, set[str] | None]) -> list[str]:
        folder, _, name = url.rpartition("/")
        magic = glob.has_magic(url)
        if glob.has_magic(folder):
            found = self._glob(url, setting)
        else:
            if folder not in folders:
                folders[folder] = self._names(folder, setting)
            names = folders[folder]
            if names is None and magic:
                raise DataError(
                    f"{setting}: {url}: this storage does not list what is in {folder}; name the shards with braces, "
                    "such as train-{0000..0099}.tar, or mend the credentials"
                )
            if names is None:  # it will tell when the shard is read
                found = [url]
            elif magic:
                found = [f"{folder}/{n}" if folder else n for n in fnmatch.filter(names, name)]
            else:
                found = [url] if name in names else []
        if found:
            # Absolute: tasks read them from other working directories than the job's.
            return [match if "://" in match else os.path.abspath(match) for match in found]
        if "://" not in url and not glob.has_magic(folder) and not Path(folder or ".").is_dir():
            raise DataError(f"{setting}: {url}: there is no folder {folder}; check the path")
        what = "no shard matches" if magic else "the shard is missing"
        raise DataError(f"{setting}: {redact(url)}: {what}; check the pattern, or list what is in {folder or '.'}")

    def _names(self, folder: str, setting: str) -> set[str] | None:
        """Names of the files in a folder; None where that cannot be known."""
        if "://" not in folder:
            try:
                with os.scandir(folder or ".") as entries:
                    return {entry.name for entry in entries if entry.is_file()}
            except OSError:
                return set()
        if folder.startswith(("http://", "https://")):
            return None
        fs, path = self.filesystem(folder, setting)
        try:
            found = self._patiently(partial(self._call, fs, "ls", path, detail=False))
        except FileNotFoundError:
            return set()
        except PermissionError:
            return None
        return {str(name).rstrip("/").rpartition("/")[2] for name in found}

    def _glob(self, url: str, setting: str) -> list[str]:
        if "://" not in url:
            return [match for match in glob.glob(url) if Path(match).is_file()]
        fs, path = self.filesystem(url, setting)
        try:
            return [fs.unstrip_protocol(match) for match in self._patiently(partial(self._call, fs, "glob", path))]
        except PermissionError as error:
            raise DataError(f"{setting}: {url} may not be listed: {redact(str(error))}") from None

    # --- Reading ---

    def read(self, url: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        if "://" not in url:
            try:
                return Path(url).read_bytes()
            except OSError:
                return None
        fs, path = self.filesystem(url, url)
        try:
            return self._patiently(partial(self._call, fs, "cat_file", path))
        except _PERMANENT:
            return None  # there is none, or the storage does not say whether there is one

    def version(self, url: str) -> list[str]:
        """What tells a file from other versions of it, without reading it.

        Raises:
            DataError: it cannot be asked for.
        """
        try:
            if (local := local_path(url)) is not None:
                stat = os.stat(local)
                return [str(stat.st_size), str(stat.st_mtime_ns)]
            fs, path = self.filesystem(url, url)
            return _version(self._patiently(partial(self._call, fs, "info", path)))
        except DataError as error:
            raise DataError(f"{redact(url)} {error}") from None
        except OSError as error:
            raise DataError(f"{redact(url)} cannot be opened: {redact(error.strerror or str(error))}") from None

    def open(self, url: str) -> BinaryIO:
        """A shard, opened: the file itself, or a local copy, which is fetched when there is none.

        Raises:
            DataError: the shard cannot be fetched; the message says why, without secrets.
            OSError: a local shard cannot be opened.
        """
        if (local := local_path(url)) is not None:
            return open(local, "rb")
        while True:
            with contextlib.suppress(FileNotFoundError):  # another task made room; fetch it again
                return self._copy(url).open("rb")

    def _copy(self, url: str) -> Path:
        """The local copy of a remote shard."""
        try:
            fs, path = self.filesystem(url, url)
            info = self._fetched(partial(self._call, fs, "info", path))
            size = info.get("size")
            if size is None:
                raise DataError("cannot be fetched: the server does not tell its size")
            # Another version of the shard is another copy.
            name = hashlib.sha256(json.dumps([url, _version(info)]).encode()).hexdigest()
            copy = self.cache / f"{name}.tar"
            self.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(self.cache / f"lock-{int(name[:8], 16) % LOCKS:03d}"):
                if not copy.exists():
                    make_room(self.cache, self.cache_bytes, size)
                    self._fetch(fs, path, size, copy)
                    make_room(self.cache, self.cache_bytes, keep=copy)  # others may have been fetched meanwhile
            with contextlib.suppress(FileNotFoundError):
                os.utime(copy)  # used now: the last to make room
            return copy
        except OSError as error:
            raise DataError(f"cannot be copied to {self.cache}: {redact(str(error))}") from None

    def _fetch(self, fs: Any, path: str, size: int, copy: Path) -> None:
        """Appends the blocks that are missing to the part that is there, perhaps from a process that died."""
        part = copy.with_suffix(".part")
        with part.open("ab") as file:
            while (start := file.tell()) < size:
                stop = min(start + BLOCK_BYTES, size)
                block = self._fetched(partial(self._call, fs, "cat_file", path, start=start, end=stop))
                if len(block) == size > stop - start:  # a web server that does not know of ranges
                    block = block[start:]
                if not block:
                    raise DataError(f"cannot be fetched: the storage gives no byte after {start:,} of {size:,}")
                file.write(block)
        part.replace(copy)

    def _fetched(self, call: Callable[[], Any]) -> Any:
        """As `_patiently`; what waiting does not mend is a DataError too, apart from troubles of the local disk."""
        try:
            return self._patiently(call)
        except _PERMANENT as error:
            raise DataError(f"cannot be fetched: {redact(str(error)) or type(error).__name__}") from None

    def filesystem(self, url: str, setting: str) -> tuple[Any, str]:
        """fsspec's file system of a URL, and the path in it.

        Raises:
            DataError: there is none for its protocol.
        """
        protocol = url.partition("://")[0]
        options = self._options.get(protocol, {})
        try:
            return fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise DataError(f"{setting}: {redact(url)}: {redact(str(error))}") from None

    def _call(self, fs: Any, method: str, path: str, **arguments: Any) -> Any:
        """A file system's method; a stalled connection is given up where the file system allows."""
        if fs.async_impl:
            return fsspec.asyn.sync(fs.loop, getattr(fs, f"_{method}"), path, timeout=self.timeout, **arguments)
        return getattr(fs, method)(path, **arguments)

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """The call's result. Errors that may pass are waited out, with jitter: a crowd must not come back at once."""
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except _PERMANENT:
                raise
            except Exception as error:
                # A web server's refusal, a misspelt option, no credentials: waiting mends none of them.
                status = getattr(error, "status", 0)
                if isinstance(error, TypeError) or type(error).__name__ in _HOPELESS:
                    raise DataError(f"cannot be fetched: {redact(str(error))}; see data.storage_options") from None
                if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
                    raise PermissionError(redact(str(error))) from None
                if attempt == _ATTEMPTS - 1:
                    reason = redact(str(error)) or type(error).__name__
                    raise DataError(
                        f"cannot be fetched: {_ATTEMPTS} attempts failed, the last with: {reason}"
                    ) from None
                time.sleep(random.random() * min(_LONGEST_PAUSE, 0.25 * 2**attempt))
        raise AssertionError
