"""Makes training data: WebDataset shards with audio or notation and metadata, and their index.

python jobs/make_shards.py demo --out demo-data

python jobs/make_shards.py table --table music/tracks.csv --out shards --val-share 0.1

`table` and `folder` take your own music; `gtzan`, `fma`, `magnatagatune`, `jamendo`, and of notation
`wikimt`, `midicaps` and `clamp`, take those corpora in the layout in which they are published; `index`
counts the rows of shards that you have already.
Each of them explains its options with --help. The same command again goes on where an interrupted
one stopped. It runs on this machine's cores, or on the Ray cluster that RAY_ADDRESS names.
"""

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from muser_dist.cli import Progress, main
from muser_dist.errors import MuserError

if TYPE_CHECKING:
    from muser_dist.data.corpora.writer import Track


@dataclass(frozen=True)
class Demo:
    """Short pieces that are composed and synthesised here; nothing is downloaded.

    1,920 pieces of 6 seconds take about a minute on two cores and 0.3 GB. The same command again
    goes on where an interrupted one stopped, and makes the same pieces.
    """

    out: Path
    """Folder for the shards; made when missing."""
    train: int = 1536
    """Pieces for training."""
    val: int = 384
    """Pieces for validation; none of them is in training."""
    seconds: float = 6.0
    """Length of each piece, from 1 to 60."""
    seed: int = 0
    """Another seed gives other pieces."""
    shard_rows: int = 64
    """Pieces in a shard."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.demo import write_demo  # imports torch, which --help need not wait for

        write_demo(self.out, self.train, self.val, self.shard_rows, self.seed, self.seconds, Progress("pieces"))
        patterns = []
        for split, rows in (("train", self.train), ("val", self.val)):
            if rows:
                pattern = shlex.quote(f"{self.out}/{split}-*.tar")
                patterns.append(f"--data.{split} {pattern}")
                hours, shards = rows * self.seconds / 3600, -(-rows // self.shard_rows)
                print(f"{split}: {rows:,} clips, {hours:.2f} hours, {shards} shards: {pattern}")
        print(f"next: python jobs/pretrain.py tiny {' '.join(patterns)}")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What all corpora of files have in common."""

    out: Path
    """Folder for the shards; made when missing. On a cluster, every node must see it and the files."""
    shard_rows: int = 128
    """Tracks in a shard. Training shuffles inside windows of a few shards: rather many than large ones."""
    seed: int = 0
    """Decides the order of the tracks, which is mixed over all shards of a split."""

    def write(self, tracks: "list[Track]", templates: tuple[str, ...], recipe: str = "tiny") -> None:
        """Writes the shards, says what is where, and suggests how to train on them, or to score where all is test."""
        from muser_dist.data.corpora.writer import SKIPPED, write_tracks

        written = write_tracks(self.out, tracks, self.shard_rows, self.seed, Progress("tracks"))
        rows: Counter[str] = Counter()
        shards: Counter[str] = Counter()
        for name, count in written.rows.items():
            split = name.rpartition("-")[0]
            rows[split] += count
            shards[split] += 1
        patterns = {split: shlex.quote(f"{self.out}/{split}-*.tar") for split in rows}
        for split, pattern in patterns.items():
            print(f"{split}: {rows[split]:,} tracks, {shards[split]} shards: {pattern}")
        files = f", and {written.left_out:,} files of other tracks" if written.left_out else ""
        print(f"skipped: {written.skipped:,} tracks{files}; {self.out / SKIPPED} says which and why")
        said = shlex.join(templates)
        if "train" in patterns:
            arguments = [f"--data.{split} {patterns[split]}" for split in ("train", "val") if split in patterns]
            print(f"next: python jobs/pretrain.py {recipe} {' '.join(arguments)} --data.templates {said}")
        else:
            (pattern, *_) = patterns.values()
            print(f"next: python jobs/evaluate.py MODEL --val {pattern} --templates {said}")


@dataclass(frozen=True, kw_only=True)
class Table(Corpus):
    """Your own music: a folder of audio and a table with a row for each file.

    One column names the file; all others become metadata fields, for templates such as
    'A song of {genre}, by {artist}'. Empty cells are left out.
    """

    table: Path
    """.csv or .tsv with a header line, .jsonl with an object in each line, or .parquet."""
    audio: str = "audio"
    """Column with the path of each file."""
    audio_root: Path | None = None
    """Folder that these paths start from, and that they may not leave; the table's by default."""
    key: str | None = None
    """Column that names the rows uniquely; by default the file's path does."""
    split: str | None = None
    """Column that says train, val or test; by default all rows are for training."""
    val_share: float = 0.0
    """Without such a column: share of the rows that goes to validation, drawn by a hash of the key."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.table import read_table

        tracks = read_table(self.table, self.audio, self.audio_root, self.key, self.split, self.val_share)
        counts = Counter(field for track in tracks for field in track.metadata)
        fields = [field for field, _ in counts.most_common(4)] or ["caption"]
        self.write(tracks, (", ".join(f"{{{field}}}" for field in fields),))


@dataclass(frozen=True, kw_only=True)
class Folder(Corpus):
    """Your own scores, MIDI and recordings, without a table: files that share a name are one track.

    irish/jig.abc, irish/jig.mid and irish/jig.mp3 are a track, and irish/jig.json may be an object with its fields.
    """

    root: Path
    """Folder of the files, those of the folders in it too."""
    val_share: float = 0.0
    """Share of the tracks that goes to validation, drawn by a hash of the path."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.folder import TEMPLATES, read_folder
        from muser_dist.data.symbolic.members import is_notation

        tracks = read_folder(self.root, self.val_share)
        notation = all(is_notation(file.name) for track in tracks for file in track.files)
        self.write(tracks, TEMPLATES, "clamp2_tiny" if notation else "tiny")


@dataclass(frozen=True, kw_only=True)
class WikiMT(Corpus):
    """WikiMT, 1,010 lead sheets in ABC with descriptions, for evaluation: wikimusictext.jsonl."""

    file: Path
    """wikimusictext.jsonl."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.wikimt import TEMPLATES, read_wikimt

        self.write(read_wikimt(self.file), TEMPLATES, "clamp2_tiny")


@dataclass(frozen=True, kw_only=True)
class MidiCaps(Corpus):
    """MidiCaps, 168,407 MIDI files with captions: train.json and lmd_full/, which midicaps.tar.gz unpacks to."""

    root: Path
    """Folder with train.json and lmd_full/."""
    val_share: float = 0.01
    """Share of what is not marked as test_set that goes to validation, drawn by a hash of the path."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.midicaps import TEMPLATES, read_midicaps

        self.write(read_midicaps(self.root, val_share=self.val_share), TEMPLATES, "clamp2_tiny")


@dataclass(frozen=True, kw_only=True)
class Clamp(Corpus):
    """JSON lines as CLaMP 2 takes them: metadata, summaries in several languages, and the paths of ABC and MIDI."""

    file: Path
    """The JSON lines."""
    root: Path | None = None
    """Folder that their `filepaths` start from, and that they may not leave; the file's by default."""
    val_share: float = 0.01
    """Share of the lines that goes to validation, drawn by a hash of the first path."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.clamp import TEMPLATES, read_clamp

        self.write(read_clamp(self.file, self.root, self.val_share), TEMPLATES, "clamp2_tiny")


@dataclass(frozen=True, kw_only=True)
class Gtzan(Corpus):
    """GTZAN, ten genres of 100 clips: genres_original/blues/blues.00000.wav or genres/blues/blues.00000.au.

    It goes by the fault-filtered split; files that are in none of its lists are listed as skipped.
    """

    root: Path
    """Folder with genres_original/ or genres/."""
    splits: Path
    """Folder with train_filtered.txt, valid_filtered.txt and test_filtered.txt."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.gtzan import TEMPLATES, read_gtzan

        self.write(read_gtzan(self.root, self.splits), TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class Fma(Corpus):
    """FMA, the Free Music Archive with genres in a hierarchy: fma_metadata/ and fma_small/000/000002.mp3."""

    root: Path
    """Folder with fma_metadata/ and fma_small/, fma_medium/, fma_large/ or fma_full/."""
    subset: Literal["small", "medium", "large", "full"] = "small"
    """8,000, 25,000 or 106,574 clips of 30 seconds, or the whole tracks."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.fma import TEMPLATES, read_fma

        self.write(read_fma(self.root, self.subset), TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class MagnaTagATune(Corpus):
    """MagnaTagATune, clips with tags: annotations_final.csv and 0/ to f/; clip_info_final.csv adds titles.

    The 50 most frequent tags count; clips without any of them are listed as skipped.
    """

    root: Path
    """Folder with annotations_final.csv and the folders of clips."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.magnatagatune import TEMPLATES, read_magnatagatune

        self.write(read_magnatagatune(self.root), TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class Jamendo(Corpus):
    """MTG-Jamendo, whole tracks with genre, instrument and mood tags; raw.meta.tsv adds titles."""

    metadata: Path
    """The folder data/ of the dataset's repository."""
    audio: Path
    """Folder with 00/ to 99/, whose files may be called 948.mp3 or 948.low.mp3."""
    tags: str = "autotagging"
    """Or autotagging_top50tags, autotagging_genre, autotagging_instrument, autotagging_moodtheme."""
    split: int | None = 0
    """Number of the split, from 0 to 4; None takes the unsplit table, all of it for training."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        from muser_dist.data.corpora.jamendo import TEMPLATES, read_jamendo

        self.write(read_jamendo(self.metadata, self.audio, self.tags, self.split), TEMPLATES)


@dataclass(frozen=True)
class Index:
    """Counts the rows of shards that are there already, so that runs start without reading them.

    Writes muser-index.json beside them. Do it again when shards were added or changed.
    """

    folder: Path
    """Folder of this machine with *.tar; copy the index along with them, to S3 as well."""

    def make(self) -> None:
        """Writes the index and says what it counts."""
        from muser_dist.data.corpora.writer import SIDECAR, write_index

        rows = write_index(self.folder, Progress("shards"))
        print(f"{self.folder / SIDECAR}: {sum(rows.values()):,} rows in {len(rows):,} shards")


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": Demo,
    "table": Table,
    "folder": Folder,
    "gtzan": Gtzan,
    "fma": Fma,
    "magnatagatune": MagnaTagATune,
    "jamendo": Jamendo,
    "wikimt": WikiMT,
    "midicaps": MidiCaps,
    "clamp": Clamp,
    "index": Index,
}


def job(arguments: list[str]) -> None:
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="jobs/make_shards.py", description=__doc__, args=arguments
    )
    try:
        command.make()
    except ModuleNotFoundError as error:
        extra = "data" if isinstance(command, Demo) else "train"
        raise MuserError(f"{error}; pip install 'muser_dist[{extra}]' brings what makes shards") from None


if __name__ == "__main__":
    main(job)
