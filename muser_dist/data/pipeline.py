"""The data path: numbered chunks of c rows, read and decoded by Ray Data, dealt to the workers.

In step t the global batch is K chunks; chunk j goes to rank j mod W. A step is padded with
all-masked chunks to a multiple of W, so every rank makes the same number of forward passes.
A row that cannot be used keeps its place with its flags off, and says why.

A chunk is a dict of arrays, one Arrow row and one block:

    step, chunk      int64 ()        optimizer step, and number of the chunk in it
    row, epoch       int64 (c,)      number of the row in the sorted shards, pass; -1 is padding
    key              str   (c,)
    valid_<modality> bool  (c,)      for each modality of the model
    audio            int16 (c, samples)
    audio_length     int32 (c,)      samples before the padding
    text             str   (c,)
    text_ids         int32 (c, max_tokens)
    text_length      int32 (c,)
    text_id          int64 (c,)      which texts state the same facts; -1 where there is none
    fields           str   (c,)      metadata as JSON, for evaluation
    problems         list of str     JSON entries for the quarantine
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from muser_dist.config import DataConfig, Modality, RunConfig
from muser_dist.data import audio
from muser_dist.data.shards import Plan, Rows, ShardIndex
from muser_dist.data.tar import Sample, read_member, walk
from muser_dist.data.text import load_tokenizer, read_fields, render, text_id
from muser_dist.errors import DataError

if TYPE_CHECKING:
    import ray.data

Chunk = dict[str, Any]

# Rows whose compressed bytes one task holds at a time. A task walks the headers of every shard
# of its window, so it should decode many rows for each walk; and tasks should be many more than
# decoding slots, so that the pool stays busy.
ROWS_PER_TASK = 256


@dataclass(frozen=True)
class Problem:
    """An entry of the quarantine: why a member or a whole row could not be used."""

    epoch: int
    row: int
    shard: str
    key: str
    member: str
    reason: str
    offset: int | None


@dataclass(frozen=True)
class RawRow:
    """The compressed members of a row, or why there are none."""

    shard: str
    key: str = ""
    offset: int | None = None
    audio: bytes | None = None
    audio_name: str = ""
    metadata: bytes | None = None
    text: bytes | None = None
    problem: str | None = None


class ChunkReader:
    """Makes chunks out of a plan. Plain Python: Ray calls it in tasks, evaluation directly.

    Args:
        index: the shards.
        plan: the order of their rows.
        data: how clips and texts are treated.
        modalities: those of the model; each gets its valid flag.
        chunk: rows in a chunk (c).
        chunks_per_step: chunks in a global batch (K).
        slots_per_step: K padded to a multiple of the number of workers.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        data: DataConfig,
        modalities: tuple[Modality, ...],
        chunk: int,
        chunks_per_step: int,
        slots_per_step: int,
    ) -> None:
        self.index = index
        self.plan = plan
        self.data = data
        self.modalities = modalities
        self.chunk = chunk
        self.chunks_per_step = chunks_per_step
        self.slots_per_step = slots_per_step

    def read(self, slots: Iterable[int]) -> Iterator[Chunk]:
        """Yields the chunks with these numbers, counted over the run, padding included.

        All of them are read before the first is decoded: give few at a time.
        """
        layout = [(slot, self._rows_of(slot)) for slot in slots]
        raw = self._read_raw([rows for _, rows in layout])
        for slot, rows in layout:
            yield self._decode_chunk(slot, rows, raw)

    def _rows_of(self, slot: int) -> Rows:
        step, chunk = divmod(slot, self.slots_per_step)
        if chunk >= self.chunks_per_step:
            nothing = np.full(self.chunk, -1)
            return Rows(nothing, nothing, nothing, nothing)
        start = (step * self.chunks_per_step + chunk) * self.chunk
        return self.plan.rows(start, start + self.chunk)

    def _read_raw(self, layout: list[Rows]) -> dict[int, RawRow]:
        """The members of all rows of the layout, by row index; each shard is walked once."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for rows in layout:
            for shard, row in zip(rows.shard.tolist(), rows.row.tolist(), strict=True):
                if shard >= 0:
                    wanted[shard].add(row)
        raw: dict[int, RawRow] = {}
        for shard, numbers in wanted.items():
            first = int(self.plan.first[shard])
            for number, row in _read_shard(self.index.urls[shard], numbers):
                raw[first + number] = row
        return raw

    def _decode_chunk(self, slot: int, rows: Rows, raw: dict[int, RawRow]) -> Chunk:
        step, number = divmod(slot, self.slots_per_step)
        c = self.chunk
        waveforms = np.zeros((c, self.data.crop_samples), np.int16)
        lengths, text_ids = np.zeros(c, np.int32), np.full(c, -1, np.int64)
        heard, stated = np.zeros(c, bool), np.zeros(c, bool)
        keys, sentences, fields, problems = [""] * c, [""] * c, ["{}"] * c, []
        for i, (epoch, index) in enumerate(zip(rows.epoch.tolist(), rows.index.tolist(), strict=True)):
            if index < 0:
                continue
            row = raw[index]
            keys[i] = row.key
            rng = self.plan.rng(epoch, index) if self.plan.shuffle else None
            # Drawn in this order, always both: a missing text must not move the crop.
            position = rng.random() if rng else 0.5
            template = self.data.templates[rng.integers(len(self.data.templates)) if rng else 0]

            def report(member: str, reason: str, row: RawRow = row, epoch: int = epoch, index: int = index) -> None:
                entry = Problem(epoch, index, row.shard, row.key, member, reason, row.offset)
                problems.append(json.dumps(asdict(entry)))

            if row.problem is not None:
                report("", row.problem)
                continue
            if "audio" in self.modalities or "spectrogram" in self.modalities:
                try:
                    if row.audio is None:
                        raise DataError(f"no audio member ({', '.join(audio.EXTENSIONS)})")
                    waveforms[i], lengths[i] = audio.decode(
                        row.audio, self.data.sample_rate, self.data.crop_samples, position
                    )
                    heard[i] = True
                except Exception as error:  # whatever it is, one row must not end the run
                    report(row.audio_name, _reason(error))
            try:
                if row.metadata is None and row.text is None:
                    raise DataError("no .json and no .txt member")
                values = read_fields(row.metadata, row.text)
                fields[i] = json.dumps(values)
                sentences[i], facts = self._say(template, values)
                text_ids[i] = text_id(facts)
                stated[i] = True
            except Exception as error:
                report("json" if row.metadata is not None else "", _reason(error))
        tokenizer = load_tokenizer(self.data.tokenizer, self.data.vocabulary, self.data.max_tokens)
        ids, id_lengths = tokenizer(sentences)
        chunk: Chunk = {
            "step": np.int64(step),
            "chunk": np.int64(number),
            "row": rows.index,
            "epoch": rows.epoch,
            "key": keys,
            "audio": waveforms,
            "audio_length": lengths,
            "text": sentences,
            "text_ids": ids,
            "text_length": id_lengths,
            "text_id": text_ids,
            "fields": fields,
            "problems": problems,
        }
        for modality in self.modalities:
            chunk[f"valid_{modality}"] = stated if modality == "text" else heard
        return chunk

    def _say(self, template: str, values: dict[str, str]) -> tuple[str, dict[str, str]]:
        """The chosen template's sentence, or the first that has something to say."""
        for candidate in (template, *self.data.templates):
            sentence, facts = render(candidate, values)
            if facts:
                return sentence, facts
        raise DataError("no text: it has none of the fields that data.templates name")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def _read_shard(url: str, numbers: set[int]) -> Iterator[tuple[int, RawRow]]:
    """Yields the wanted samples of a shard; those it turns out not to have come with a problem."""
    left = set(numbers)
    end = "holds fewer samples than its index says"
    try:
        with fsspec.open(url, "rb") as file:
            for sample in walk(file):
                if sample.index in left:
                    left.discard(sample.index)
                    yield sample.index, _read_sample(file, url, sample)
                if not left:
                    return
    except DataError as error:
        end = f"the shard {error}"
    except OSError as error:
        end = f"the shard cannot be read: {error}"
    for number in sorted(left):
        yield number, RawRow(url, problem=end)


def _read_sample(file: Any, url: str, sample: Sample) -> RawRow:
    # The last extension decides, so that stems with dots ("01. Song.mp3") find their members.
    names = {extension.rpartition(".")[2]: extension for extension in sample.members}
    sounds = [name for name in sample.members if name.rpartition(".")[2] in audio.EXTENSIONS]
    audio_name = sounds[0] if sounds else None
    problem = sample.problem
    if problem is None and len(sounds) > 1:
        problem = f"several audio members ({', '.join(sounds)}); a key ends at the first dot of the file name"
    if problem is not None:
        return RawRow(url, sample.key, sample.offset, problem=problem)

    def read(extension: str | None) -> bytes | None:
        return read_member(file, sample.members[extension]) if extension in sample.members else None

    try:
        return RawRow(
            url,
            sample.key,
            sample.offset,
            read(audio_name),
            audio_name or "",
            read(names.get("json")),
            read(names.get("txt")),
        )
    except DataError as error:
        return RawRow(url, sample.key, sample.offset, problem=str(error))


def training_reader(config: RunConfig, index: ShardIndex) -> ChunkReader:
    """The reader of a training run's chunks."""
    workers, k = config.train.workers, config.train.chunks_per_step
    plan = Plan(index.rows, config.seed, config.data.window_shards, shuffle=True)
    return ChunkReader(
        index,
        plan,
        config.data,
        tuple(config.model.towers()),
        chunk=config.train.chunk,
        chunks_per_step=k,
        slots_per_step=-(-k // workers) * workers,
    )


def evaluation_chunks(config: RunConfig, index: ShardIndex) -> Iterator[Chunk]:
    """One pass over the shards in order, in this process; the last chunk is padded."""
    plan = Plan(index.rows, config.seed, config.data.window_shards, shuffle=False)
    reader = ChunkReader(index, plan, config.data, tuple(config.model.towers()), config.train.chunk, 1, 1)
    chunks = -(-min(plan.total, config.evaluate.rows) // config.train.chunk)
    at_once = max(1, ROWS_PER_TASK // config.train.chunk)
    for start in range(0, chunks, at_once):
        yield from reader.read(range(start, min(chunks, start + at_once)))


def ray_dataset(reader: ChunkReader, first_step: int, steps: int) -> "ray.data.Dataset":
    """The chunks of all steps from `first_step` on, as a Ray Dataset that deals them in order.

    Reading and decoding are one task. One chunk is one row and one block; split with the
    options of muser_dist/data/executor.py, block i goes to split i mod W.
    """
    import pyarrow as pa
    import ray.data
    from ray.data.extensions import ArrowTensorArray

    from muser_dist.data.executor import set_context

    first, last = first_step * reader.slots_per_step, steps * reader.slots_per_step
    at_once = max(1, ROWS_PER_TASK // reader.chunk)
    tasks = -(-(last - first) // at_once)

    def read(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for task in batch["id"].tolist():
            start = first + task * at_once
            for chunk in reader.read(range(start, min(last, start + at_once))):
                del chunk["fields"], chunk["text"]  # for evaluation only
                yield pa.table(
                    {
                        name: pa.array([value])
                        if isinstance(value, list)
                        else ArrowTensorArray.from_numpy(value[None])
                        if value.ndim
                        else pa.array([value.item()])
                        for name, value in chunk.items()
                    }
                )

    set_context()
    return ray.data.range(tasks, override_num_blocks=tasks).map_batches(read, batch_size=None, num_cpus=1)
