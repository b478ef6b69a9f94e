"""Numbered chunks of c rows, read and decoded: plain Python, which Ray calls in tasks.

In step t the global batch is K chunks; chunk j goes to rank j mod W. A step is padded with
all-masked chunks to a multiple of W, so every rank makes the same number of forward passes.
A row that cannot be used keeps its place with its flags off, and says why.

A chunk is a dict of arrays, one Arrow row and one block:

    step, chunk      int64 ()        optimizer step, and number of the chunk in it
    row, epoch       int64 (c,)      number of the row in the sorted shards, pass; -1 is padding
    key, shard       str   (c,)
    source           str   (c,)      name of the source
    crop             float64 (c,)    where the crop lies in the clip: 0 is its head, 1 its tail; of two views (c, 2)
    valid_<modality> bool  (c,)      for each modality that the model embeds, and for "view" and "notation" where they
                                     are asked for; where rows come in pairs, valid_partner and valid_fused say what is
                                     there of the other song
    audio            int16 (c, samples), where a tower or the front end on the worker needs it
    audio_length     int32 (c,)      samples before the padding, where a tower hears
    view             int16 (c, samples), where a pair names it: another crop, drawn and augmented apart
    view_length      int32 (c,)
    spectrogram      float16 (c, 1, mels, frames), where tasks make it
    patches          uint8 (c, patches, 64), where a tower reads notation (data/symbolic); and so is patches_length
    patches_length   int32 (c,)      patches before the padding
    notation_patches uint8 (c, patches, 64), where a pair names it, and in evaluation where data.symbolic.notations are
                                     two: another notation of the same piece, drawn apart; and so is notation_length
    notation_length  int32 (c,)
    features         float16 (c, windows, size), where a tower reads features (data/features.py)
    features_length  int32 (c,)      windows before the padding
    text             str   (c,)
    text_ids         int32 (c, max_tokens), where a tower reads texts; and so is text_length
    text_length      int32 (c,)
    text_id          int64 (c,)      which texts state the same facts; -1 where there is none
    label_id         int64 (c,)      which rows have the same value of data.label; -1 where there is none
    liked            int64 (c, n)    rows of songs that are liked together with it, where objective.exclude_liked asks
    label/<field>    int64 (c,) or int8 (c, values), of each field that is learned: see `Labels.empty`
    valid_label      bool  (c,)      has a label in one of those fields, where there are any
    heard, cached    bool  (c,)      its (first) crop is there; its clip came from the cache (data.keep_clips)
    in_val           bool  (c,)      same audio or same title as a validation row
    fields           str   (c,)      metadata as JSON; in evaluation only
    problems         list of str     JSON entries for the quarantine
    seconds          float64 ()      time that reading and decoding took
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from muser_dist.config import RunConfig
from muser_dist.data.config import SourceConfig
from muser_dist.data.decoder import Crop, decoder
from muser_dist.data.features import features_bytes, read_features
from muser_dist.data.labels import Labels
from muser_dist.data.leakage import file_id, title_id
from muser_dist.data.notation import Seeds, notation_bytes, read_notation
from muser_dist.data.partners import Partners
from muser_dist.data.plan import Plan, Rows
from muser_dist.data.rows import Row, RowReader
from muser_dist.data.text import TextPolicy, by_language, flat, joined, load_tokenizer, read_fields, text_id
from muser_dist.errors import DataError

Chunk = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """An entry of the quarantine: why a member or a whole row could not be used.

    `row` is None where the entry is about `count` surplus samples of a shard, which no row stands for.
    """

    epoch: int
    row: int | None
    source: str
    shard: str
    key: str
    member: str
    reason: str
    offset: int | None
    count: int = 1


@dataclass(frozen=True)
class Outline:
    """What a chunk will hold, known without decoding it.

    Attributes:
        crops: (c, 1) or, with a second view, (c, 2): where crops lie in their clips.
        draws: of each row, the source of its other random choices.
        view_seeds: (c,) of the second view's augmentation.
        notation_seeds: (c,) of what is drawn of notation; None where nothing is.
        runs: (c,) where the windows that are read of features lie in their songs.
    """

    step: int
    chunk: int
    rows: Rows
    found: list[Row | None]
    crops: np.ndarray
    draws: list[np.random.Generator | None]
    view_seeds: list[int]
    notation_seeds: list[Seeds | None]
    runs: list[float]

    @property
    def crop(self) -> np.ndarray:
        """The crops as chunks have them: (c,) where there is one of each row."""
        return self.crops[:, 0] if self.crops.shape[1] == 1 else self.crops

    @property
    def keys(self) -> list[str]:
        """The samples' keys; empty for padding and for samples that are not there."""
        return [row.key if row else "" for row in self.found]


def chunk_digest(step: int, chunk: int, keys: Sequence[str], crop: np.ndarray) -> str:
    """SHA-256 over (step, chunk, keys, crops): equal where two runs deliver the same."""
    return hashlib.sha256(repr((step, chunk, list(keys), crop.tolist())).encode()).hexdigest()


def chain_digest(digest: str, chunk: str) -> str:
    """The digest of all chunks so far and the next one; the first follows on ""."""
    return hashlib.sha256((digest + chunk).encode()).hexdigest()


class ChunkReader:
    """Makes chunks out of a plan.

    Args:
        rows: reads single rows.
        plan: their order.
        sources: names and templates.
        config: how clips, notation, features and texts are treated; what the model embeds in training, or in evaluation
            where the plan does not shuffle.
        chunk: rows in a chunk (c).
        chunks_per_step: chunks in a global batch (K); `for_workers` pads them.
        val_ids: (n,) int64, sorted: `file_id` and `title_id` of the validation rows.
        partners: where rows come in pairs (2i and 2i + 1), those that the plan draws from.
    """

    def __init__(
        self,
        rows: RowReader,
        plan: Plan,
        sources: Sequence[SourceConfig],
        config: RunConfig,
        chunk: int,
        chunks_per_step: int,
        val_ids: np.ndarray,
        partners: Partners | None = None,
    ) -> None:
        self.rows = rows
        self.partners = partners
        self.likes = config.data.partners_known if partners and config.objective.exclude_liked else 0
        self.plan = plan
        self.sources = sources
        self.data = config.data
        self.model = config.model
        self.features = config.features if plan.shuffle else config.evaluated
        self.hears = "audio" in self.features or "spectrogram" in self.features
        self.second_view = "view" in self.features
        self.needs_notation = plan.shuffle and config.objective.needs_notation
        self.reads_text = "text" in self.features or config.objective.reads_text
        self.chunk = chunk
        self.chunks_per_step = chunks_per_step
        self.slots_per_step = chunks_per_step
        self.val_ids = val_ids

    @property
    def chunk_bytes(self) -> int:
        """About the size of a chunk: that of its waveforms, which spectrograms in their place do not reach, of its
        notation and features, and of its tokens."""
        data = self.data
        row = 2 * data.crop_samples * (self.hears + self.second_view)
        row += notation_bytes(data) * sum(name in self.features for name in ("symbolic", "notation"))
        row += features_bytes(data) * ("features" in self.features)
        row += 4 * data.max_tokens * ("text" in self.features)
        return self.chunk * row

    def for_workers(self, workers: int) -> "ChunkReader":
        """The same chunks, for so many workers: with steps padded to a multiple of them."""
        reader = copy.copy(self)
        reader.slots_per_step = -(-self.chunks_per_step // workers) * workers
        return reader

    def outline(self, slot: int) -> Outline:
        """The chunk of a slot, found without decoding; slots count over the run, padding included."""
        step, chunk = divmod(slot, self.slots_per_step)
        if chunk < self.chunks_per_step:
            start = (step * self.chunks_per_step + chunk) * self.chunk
            rows = self.plan.rows(start, start + self.chunk)
        else:
            rows = Rows.padding(self.chunk)
        crops, found, draws = np.full((self.chunk, 1 + self.second_view), 0.5), [], []
        view_seeds = [0] * self.chunk
        notation_seeds: list[Seeds | None] = [None] * self.chunk
        runs = [0.0] * self.chunk
        for i, (epoch, index, shard, number) in enumerate(
            zip(rows.epoch.tolist(), rows.index.tolist(), rows.shard.tolist(), rows.row.tolist(), strict=True)
        ):
            found.append(self.rows.row(shard, number) if index >= 0 else None)
            rng = self.plan.rng(epoch, index) if self.plan.shuffle and index >= 0 else None
            if rng:
                crops[i, 0] = rng.random()
            if rng and self.second_view:
                of_view = self.plan.view_rng(epoch, index)
                crops[i, 1], view_seeds[i] = of_view.random(), int(of_view.integers(2**63))
            if rng and "symbolic" in self.features:
                first, other = self.plan.notation_rng(epoch, index).integers(2**63, size=2).tolist()
                notation_seeds[i] = first, other
            if rng and "features" in self.features:
                runs[i] = self.plan.features_rng(epoch, index).random()
            draws.append(rng)
        return Outline(step, chunk, rows, found, crops, draws, view_seeds, notation_seeds, runs)

    def read(self, slots: Iterable[int]) -> Iterator[Chunk]:
        """Yields the chunks of these slots."""
        for slot in slots:
            start = time.perf_counter()
            chunk = self._decode(self.outline(slot))
            chunk["seconds"] = np.float64(time.perf_counter() - start)
            yield chunk

    def _in_validation(self, ids: list[int]) -> bool:
        place = np.searchsorted(self.val_ids, ids)  # np.isin would sort them all again for each row
        return bool((self.val_ids[np.minimum(place, len(self.val_ids) - 1)] == ids).any())

    @cached_property
    def _front_end(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Waveforms to spectrograms, where tasks make them."""
        if self.data.spectrogram_on == "device" or self.model.spectrogram is None or "spectrogram" not in self.features:
            return None
        import torch  # takes seconds and megabytes in each process, so only where it is needed

        from muser_dist.data.spectrogram import in_tasks

        module = in_tasks(self.data, self.model.spectrogram)

        def make(waveforms: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return module(torch.from_numpy(waveforms)).half().numpy()

        return make

    @cached_property
    def _labels(self) -> Labels:
        return Labels(self.data)

    def _decode(self, outline: Outline) -> Chunk:
        c, data = self.chunk, self.data
        text_ids, label_ids = np.full(c, -1, np.int64), np.full(c, -1, np.int64)
        heard, cached, stated, labelled, in_val = (np.zeros(c, bool) for _ in range(5))
        sources, shards, sentences, fields = [""] * c, [""] * c, [""] * c, ["{}"] * c
        problems: list[str] = []
        leads = self.plan.leads(outline.rows)
        crops: dict[int, Crop] = {}
        labels = self._labels.empty(c)
        policies = [TextPolicy(data, source.templates or data.templates) for source in self.sources]
        needs_metadata = "text" in self.features or bool(labels)
        reads_metadata = needs_metadata or self.reads_text or data.label or len(self.val_ids) or not self.plan.shuffle

        def report(i: int, member: str, error: Exception) -> None:
            reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            problems.append(self._entry(outline, i, member=member, reason=reason))

        for i, row in enumerate(outline.found):
            if row is None:
                continue
            sources[i], shards[i] = self.sources[outline.rows.source[i]].name, row.shard
            rng = outline.draws[i]
            seed = int(rng.integers(2**63)) if rng else None  # always drawn: augmenting must not change the text
            # Told once a pass: by whoever reads the first row of the shard that is in it.
            if leads[i] and (surplus := self.rows.surplus(int(outline.rows.shard[i]))):
                reason = f"the shard holds {surplus} samples more than its index says; they are not used"
                of_shard = {"row": None, "key": "", "offset": None, "count": surplus}
                problems.append(self._entry(outline, i, reason=reason, **of_shard))
            if row.problem is not None:
                report(i, "", DataError(row.problem))
                continue
            ids: list[int] = []
            if self.hears:
                try:
                    sound = row.sound()
                    if len(self.val_ids):
                        ids.append(file_id(sound))
                    crops[i] = Crop(sound, float(outline.crops[i, 0]), seed)
                except Exception as error:  # whatever it is, one row must not end the run
                    report(i, row.audio or "", error)
            if not reads_metadata:
                continue
            try:
                metadata, text = row.read("json"), row.read("txt")
                if metadata is None and text is None and needs_metadata:
                    raise DataError("no .json and no .txt member")
                values = read_fields(metadata, text)
                if len(self.val_ids):
                    in_val[i] = self._in_validation([*ids, *title_id(values)])
                if not self.plan.shuffle:
                    fields[i] = json.dumps(flat(values) | by_language(values))
                if data.label and (label := joined(values).get(data.label)):
                    label_ids[i] = text_id({data.label: label})
                labelled[i] = self._labels.put(labels, i, values)
                if self.reads_text:
                    with nullcontext() if "text" in self.features else suppress(DataError):
                        sentences[i], facts = policies[outline.rows.source[i]].say(values, rng)
                        text_ids[i] = text_id(facts)
                        stated[i] = True
                if labels and not labelled[i]:
                    raise DataError(f"no label: it has no known value of {', '.join(data.label_kinds())}")
            except Exception as error:
                if needs_metadata:
                    report(i, "json" if "json" in row.extensions else "", error)

        def hear(crops: dict[int, Crop], waveforms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            lengths, heard, cached = np.zeros(c, np.int32), np.zeros(c, bool), np.zeros(c, bool)
            for i, decoded in decoder(data).decode(crops, waveforms).items():
                if isinstance(decoded, DataError):
                    row = outline.found[i]
                    report(i, row.audio or "" if row else "", decoded)
                else:
                    (lengths[i], cached[i]), heard[i] = decoded, True
            waveforms[~heard] = 0
            return lengths, heard, cached

        of_sound: Chunk = {}
        if self.hears:
            waveforms = np.empty((c, data.crop_samples), np.int16)
            of_sound["audio_length"], heard, cached = hear(crops, waveforms)
            if self._front_end:
                of_sound["spectrogram"] = self._front_end(waveforms)
            if "audio" in self.features or not self._front_end:
                of_sound["audio"] = waveforms
            if self.second_view:
                # Of clips whose first crop could not be had, nothing is tried again.
                views = {
                    i: Crop(crop.sound, float(outline.crops[i, 1]), outline.view_seeds[i])
                    for i, crop in crops.items()
                    if heard[i]
                }
                of_sound["view"] = np.empty_like(waveforms)
                of_sound["view_length"], of_sound["valid_view"], _ = hear(views, of_sound["view"])
        of_members: Chunk = {}
        if "symbolic" in self.features:
            two = "notation" in self.features
            of_members |= read_notation(outline.found, outline.notation_seeds, data, report, two, self.needs_notation)
        if "features" in self.features:
            of_members |= read_features(outline.found, outline.runs, data, report)
        chunk: Chunk = {
            "step": np.int64(outline.step),
            "chunk": np.int64(outline.chunk),
            "row": outline.rows.index,
            "epoch": outline.rows.epoch,
            "key": outline.keys,
            "shard": shards,
            "source": sources,
            "crop": outline.crop,
            "text": sentences,
            "text_id": text_ids,
            "label_id": label_ids,
            "heard": heard,
            "cached": cached,
            "in_val": in_val,
            "fields": fields,
            "problems": problems,
        }
        if "text" in self.features:
            tokenizer = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens)
            chunk["text_ids"], chunk["text_length"] = tokenizer(sentences)
        flags = {"audio": heard, "spectrogram": heard, "text": stated}
        chunk |= {f"valid_{name}": flag for name, flag in flags.items() if name in self.features}
        if self.partners is not None:
            other = np.arange(c) ^ 1
            chunk["valid_partner"] = heard[other]
            chunk["valid_fused"] = (heard & stated)[other]
        if self.partners is not None and self.likes:
            none = np.full(self.likes, -1)
            chunk["liked"] = np.stack(
                [self.partners.likeliest(index, self.likes) if index >= 0 else none for index in outline.rows.index]
            )
        return chunk | of_sound | of_members | labels | ({"valid_label": labelled} if labels else {})

    def _entry(self, outline: Outline, i: int, **fields: Any) -> str:
        """An entry for the quarantine about a row of the chunk, as JSON."""
        rows, row = outline.rows, outline.found[i]
        assert row is not None
        source = self.sources[rows.source[i]].name
        of_row = Problem(int(rows.epoch[i]), int(rows.index[i]), source, row.shard, row.key, "", "", row.offset)
        return json.dumps(asdict(replace(of_row, **fields)))
