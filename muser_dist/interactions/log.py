"""What the columns of a log mean, and the layouts of published logs.

Two kinds of log are read: events (a user, an item, perhaps a time, a signal such as play or like, and a value such as
the seconds heard or a count of plays), and playlists or sessions (an id in place of the user, and positions in place of
times). A playlist in one row, with a list of items, is read too. Either becomes rows of `SCHEMA`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from muser_dist.data.config import Strict
from muser_dist.errors import ConfigError, require

SCHEMA = pa.schema(
    [
        pa.field("user", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("time", pa.int64()),
        pa.field("signal", pa.string(), nullable=False),
        pa.field("value", pa.float32()),
    ]
)
"""Interactions: user or playlist; item; seconds since 1970, or a position in the playlist, or null where the log has
neither; signal in lower case; value, null where the log has none."""

Format = Literal["parquet", "csv", "tsv", "jsonl"]


@dataclass(frozen=True)
class LogLayout(Strict):
    """Which column of a log is what."""

    user: str
    """Column of users, or of playlists or sessions: interactions are paired inside of one."""
    item: tuple[str, ...]
    """Column of items; where several are named, their values together name the item (joined by " - ")."""
    time: str | None = None
    """Column of times."""
    position: str | None = None
    """In place of times: column of positions in a playlist."""
    signal: str = "play"
    """What every row is, such as "play" or "like"; or, with `signal_column`, what rows with an empty cell are."""
    signal_column: str | None = None
    """Column that says what a row is."""
    value: str | None = None
    """Column of numbers: seconds or percent heard, plays."""
    lists: bool = False
    """Each row is a whole history or playlist: the cells of `item` are lists, those of other columns lists just as long
    or one value for all. Where neither time nor position is named, the place in the list is the position. Parquet and
    JSON lines only."""
    columns: tuple[str, ...] = ()
    """Names of all columns of a CSV or TSV that has no line of names; empty where its first line names them."""
    format: Format | None = None
    """By default what the file's name ends in says it: .parquet, .csv, .tsv, .jsonl; or of these .gz, .bz2, .zst."""
    quoted: bool | None = None
    """Whether quotation marks around cells are no part of them; by default in .csv and not in .tsv."""
    time_format: Literal["unix", "iso"] = "unix"
    """Of times in text: numbers since 1970, or YYYY-MM-DD HH:MM:SS (a T between, a fraction, a Z behind are allowed),
    taken for UTC. Columns of timestamps need neither."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Of times in numbers."""
    relative_time: bool = False
    """Times count from a beginning that the log keeps to itself: none is too early or too late, unless negative."""
    signals: dict[str, str] = field(default_factory=dict)
    """Other names for values of `signal_column`, such as {"listen": "play"}."""

    def __post_init__(self) -> None:
        require(len(self.item) >= 1, "layout: item names no column")
        require(
            self.time is None or self.position is None,
            "layout: time and position are both given; interactions have one order, so leave one out",
        )
        named = [name for name in (self.user, *self.item, self.time, self.position, self.signal_column, self.value)]
        missing = [name for name in named if name is not None and self.columns and name not in self.columns]
        require(not missing, f"layout: {', '.join(map(repr, missing))}: not among columns ({', '.join(self.columns)})")
        require(bool(self.signal), "layout: signal is empty; it says what a row is, such as play")

    @property
    def order(self) -> str | None:
        """The column of times or positions; None where there is none."""
        return self.time or self.position

    @property
    def ordered(self) -> bool:
        """Whether the log says in which order a user's interactions happened."""
        return self.lists or self.order is not None

    def used(self) -> list[str]:
        """The columns that are read, each once."""
        names = (self.user, *self.item, self.order, self.signal_column, self.value)
        return list(dict.fromkeys(name for name in names if name is not None))


LAYOUTS: dict[str, LogLayout] = {
    "events": LogLayout("user", ("item",), time="time", signal_column="signal", value="value"),
    "playlists": LogLayout("playlist", ("item",), position="position"),
    "taste_profile": LogLayout("user", ("song",), value="plays", columns=("user", "song", "plays"), format="tsv"),
    "music4all_onion": LogLayout("user_id", ("track_id",), time="timestamp", time_format="iso"),
    "lastfm_1k": LogLayout(
        "user",
        ("artist_name", "track_name"),
        time="time",
        time_format="iso",
        columns=("user", "time", "artist_id", "artist_name", "track_id", "track_name"),
    ),
    "lastfm_360k": LogLayout(
        "user", ("artist_name",), value="plays", columns=("user", "artist_id", "artist_name", "plays")
    ),
    "lfm_2b": LogLayout("user_id", ("track_id",), time="timestamp", time_format="iso"),
    "yambda": LogLayout(
        "uid",
        ("item_id",),
        time="timestamp",
        signal_column="event_type",
        value="played_ratio_pct",
        relative_time=True,
        signals={"listen": "play"},
    ),
    "yambda_listens": LogLayout("uid", ("item_id",), time="timestamp", value="played_ratio_pct", relative_time=True),
    "yambda_likes": LogLayout("uid", ("item_id",), time="timestamp", signal="like", relative_time=True),
}
"""Layouts by name. `events` and `playlists` are those of a log that you write yourself.

taste_profile: train_triplets.txt of the Echo Nest Taste Profile Subset: no line of names, no times, plays counted. Its
    songs are those of the Million Song Dataset (SO...).
music4all_onion: userid_trackid_timestamp.tsv(.bz2), with a line of names and times as 2020-01-31 12:00:00.
lastfm_1k: userid-timestamp-artid-artname-traid-traname.tsv, no line of names, times as 2009-05-04T23:08:57Z. Many rows
    have no MusicBrainz id, so a track is named by artist and title.
lastfm_360k: usersha1-artmbid-artname-plays.tsv, no line of names, no times. Its items are artists, not songs.
lfm_2b: listening_events.tsv(.bz2), with the names user_id, track_id, album_id, timestamp. From how others read it: the
    log is no longer given out.
yambda: flat/*/multi_event.parquet; yambda_listens and yambda_likes are flat/*/listens.parquet and likes.parquet. Times
    are seconds from an unnamed beginning, in steps of 5 s; played_ratio_pct is null but for listens.
"""


def load_layout(name: str) -> LogLayout:
    """A layout by its name, or from a JSON file with the fields of `LogLayout`.

    Raises:
        ConfigError: there is no such layout, or the file cannot be read or holds something else.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    if not name.endswith(".json"):
        raise ConfigError(f"layout {name!r}: there are {', '.join(LAYOUTS)}; or give a .json file with your own")
    try:
        content: Any = json.loads(Path(name).read_text())
        return TypeAdapter(LogLayout).validate_python(content)
    except OSError as error:
        raise ConfigError(f"layout: cannot read {name}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f'layout: {name}: {where}: {first["msg"]}; give {{"user": ..., "item": [...], ...}}'
        ) from None
    except ValueError as error:
        raise ConfigError(f"layout: {name} is no JSON: {error}") from None
