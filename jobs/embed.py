"""Embed shards or a folder of audio or notation: `python jobs/embed.py MODEL --shards 'DATA/*.tar' --out embeddings`.

Writes Parquet, a part for every few hundred rows, and quarantine.jsonl with what could not be embedded and why. The
same command again makes only the parts that are missing. It runs on this machine's cores, or on the Ray cluster that
RAY_ADDRESS names, every node of which must see the model and the files.

With --features it writes the shards anew in --out, with the tower's output for each window of a clip beside the other
members: what the modality `features` reads.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from muser_dist.cli import Progress, main
from muser_dist.config import Modality
from muser_dist.data.windows import Windows
from muser_dist.errors import require

_BY_DEFAULT: tuple[Modality, ...] = ("audio", "spectrogram", "symbolic")


@dataclass(frozen=True)
class Embed:
    """Embeds all rows of shards, or all files of a folder, to Parquet; or writes shards with features."""

    model: tyro.conf.Positional[Path]
    """A run's folder, or an exported model's."""
    out: Path
    """Folder for the embeddings, or for the shards with features; made when missing."""
    shards: tuple[str, ...] = ()
    """Shards: paths or URLs, with braces and globs."""
    folder: Path | None = None
    """In place of shards: a folder of audio files, or of notation, those of the folders in it too."""
    modalities: tuple[Modality, ...] = ()
    """Which of the model's towers embed each row; by default the first that it has of audio, spectrogram and symbolic,
    which is notation and is embedded alone or with text. Text comes from the first template that has something to say.
    """
    windows: Windows = "all"
    """Whole songs, or of those longer than the crop its middle alone, as evaluation hears them. Of notation all."""
    hop_seconds: float | None = None
    """From a window's begin to the next one's; the crop's length by default."""
    features: bool = False
    """In place of embeddings: shards with KEY.npy besides, (windows, width) float16, a tower's output before its head
    for windows of the model's data.crop_seconds that follow each other. A shorter last one is padded; one of less than
    half the length is left out, unless it is the only one."""
    fields: tuple[str, ...] = ()
    """Metadata fields that become columns."""
    part_rows: int = 512
    """Rows of a part, which is made anew as a whole when the job was interrupted in it."""
    gpu: bool = False
    """Encode on the cluster's GPUs; CPUs decode then."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems, as of data.storage_options in training."""
    cache_folder: str = ""
    """Folder on each node for copies of remote shards, as of data.cache_folder in training."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Embed, args=arguments, prog="jobs/embed.py", description=__doc__)
    require(bool(options.shards) != bool(options.folder), "give --shards or --folder: one of the two")
    require(options.part_rows >= 1, f"--part-rows is {options.part_rows}; a part holds at least one row")
    require(options.hop_seconds is None or options.hop_seconds > 0, "--hop-seconds must be positive")
    require(
        not options.folder or not (options.fields or "text" in options.modalities),
        "--folder: files have no metadata and no text; make shards of them (jobs/make_shards.py table), or leave "
        "--fields and text out",
    )
    require(
        not options.features or (bool(options.shards) and options.modalities in ((), ("audio",), ("spectrogram",))),
        "--features are of shards, and of one tower that hears: give --shards, and --modalities audio or spectrogram",
    )
    require(
        not options.features or (options.windows == "all" and options.hop_seconds is None and not options.fields),
        "--features are of all windows that follow each other, and fields are copied; leave --windows, --hop-seconds "
        "and --fields out",
    )
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        for name, path in (("MODEL", options.model), ("--out", options.out), ("--folder", options.folder)):
            require(
                path is None or path.is_absolute(),
                f"{name} {path} is a relative path, which in a submitted job means a temporary copy of your working "
                "directory; give an absolute path that every node sees",
            )
    from muser_dist import Muser  # after the options: importing torch takes seconds
    from muser_dist.data.rows import FileReader, RowReader, index_files
    from muser_dist.data.shards import index_shards
    from muser_dist.data.storage import Storage
    from muser_dist.embed.features import make_features
    from muser_dist.embed.job import embed
    from muser_dist.embed.parts import Manifest, Parts
    from muser_dist.embed.songs import SongReader, Wanted
    from muser_dist.train.preflight import provenance

    model = options.model.absolute()  # Ray's processes run in other working directories
    muser = Muser.from_pretrained(model)
    require(
        "features" not in options.modalities,
        "--modalities: this job embeds clips, notation and texts; features of windows are embedded by "
        "Muser.encode_features",
    )
    first = [name for name in _BY_DEFAULT if name in muser.modalities][:1]
    modalities = tuple(dict.fromkeys(options.modalities or first))
    require(len(modalities) > 0, "--modalities: the model has a tower of texts alone; give --modalities text")
    missing = [name for name in modalities if name not in muser.modalities]
    require(
        not missing, f"--modalities: the model has no {', '.join(missing)} tower, only {', '.join(muser.modalities)}"
    )
    require(not options.features or modalities[0] != "symbolic", "--features: the model has no tower that hears")
    data = replace(muser.config.data, storage_options=options.storage_options, cache_folder=options.cache_folder)
    data = replace(data, keep_clips=False)  # each is heard once, and as Muser.encode_audio hears it
    made_by = provenance(["python", "jobs/embed.py", *arguments])
    progress = Progress("rows", every=2.0)
    storage = Storage.of(data)
    if options.features:
        index = index_shards(storage, storage.expand(options.shards, "shards"), "shards")
        made, problems = make_features(
            model,
            muser,
            modalities[0],
            index,
            storage,
            options.out.absolute(),
            options.gpu,
            made_by,
            progress,
        )
        print(f"{index.total:,} rows: {made:,} with features; {problems:,} entries in {options.out}/quarantine.jsonl")
        width = muser.model.towers[modalities[0]].width
        print(
            f"next: python jobs/pretrain.py clamp3_tiny --data.features.size {width} --data.train '{options.out}/*.tar'"
        )
        return
    wanted = Wanted(modalities, options.windows, options.hop_seconds or data.crop_seconds, options.fields)
    rows: FileReader | RowReader
    if options.folder:
        root = str(options.folder.absolute())
        rows = FileReader(index_files(root, wanted.notation), root)
    else:
        rows = RowReader(index_shards(storage, storage.expand(options.shards, "shards"), "shards"), storage)
    parts = Parts(options.out.absolute(), Manifest.of(muser, wanted, rows.index, storage, options.part_rows), made_by)
    embed(model, SongReader(rows, data, wanted, muser.window_batch), parts, options.gpu, progress)
    embedded, problems = parts.finish()
    print(f"{parts.manifest.rows:,} rows: {embedded:,} embedded; {problems:,} entries in {parts.quarantine}")
    print(f"next: python jobs/search.py {options.out} {options.model} 'a slow waltz'")


if __name__ == "__main__":
    main(job)
