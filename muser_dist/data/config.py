"""DataConfig: everything that a run's config says about shards, clips and texts."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.errors import ConfigError, require
from muser_dist.strict import Strict

LABEL = "label/"
"""Of a chunk's arrays of labels and of the logits of the model's heads, names begin so; the field follows."""


@dataclass(frozen=True)
class SourceConfig(Strict):
    """One of several corpora that are mixed."""

    name: str
    """Name of the source in the accounts."""
    shards: tuple[str, ...]
    """Its shards, in the form of data.train."""
    weight: float = 1.0
    """Its share of each global batch; weights are divided by their sum."""
    templates: tuple[str, ...] = ()
    """Its sentences; data.templates when empty."""


def read_sources(path: str) -> tuple[SourceConfig, ...]:
    """The sources that a JSON file lists: [{"name": ..., "shards": [...], "weight": ...}, ...].

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    try:
        return TypeAdapter(tuple[SourceConfig, ...]).validate_python(json.loads(Path(path).read_text()))
    except OSError as error:
        raise ConfigError(f"data.sources: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"data.sources: {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; the file is a list of "
            '{"name": ..., "shards": ["FOLDER/*.tar"], "weight": 1}'
        ) from None
    except ValueError as error:
        raise ConfigError(f"data.sources: {path} is no JSON: {error}") from None


def read_label_values(path: str) -> dict[str, tuple[str, ...]]:
    """The values by field that a JSON file lists: {"genre": ["folk", "ska"], ...}.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    try:
        return TypeAdapter(dict[str, tuple[str, ...]]).validate_python(json.loads(Path(path).read_text()))
    except OSError as error:
        raise ConfigError(f"data.label_values: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # ValidationError is one
        raise ConfigError(
            f'data.label_values: {path}: {str(error).splitlines()[0]}; the file holds {{"FIELD": ["value", "value"]}}'
        ) from None


@dataclass(frozen=True)
class AugmentConfig(Strict):
    """Changes made to the waveform of a training crop, each with a probability, in this order.

    The random numbers come from the plan: (seed, pass, row) decide them.
    """

    shift: float = 0.0
    """Probability of moving the crop in time, by up to half its length; what leaves at one end
    comes back at the other."""
    polarity: float = 0.0
    """Probability of turning the waveform upside down."""
    gain: float = 0.0
    """Probability of a change of loudness."""
    gain_db: tuple[float, float] = (-15.0, 5.0)
    """Least and greatest change of loudness in dB."""
    low_pass: float = 0.0
    """Probability of a low-pass filter (12 dB an octave)."""
    low_pass_hz: tuple[float, float] = (400.0, 4000.0)
    """Least and greatest cut-off frequency in Hz."""
    noise: float = 0.0
    """Probability of added noise, white to brown: its power falls by 0 to 6 dB an octave."""
    noise_snr_db: tuple[float, float] = (5.0, 20.0)
    """Least and greatest signal-to-noise ratio in dB."""

    def __post_init__(self) -> None:
        for name in ("shift", "polarity", "gain", "low_pass", "noise"):
            require(0 <= getattr(self, name) <= 1, f"data.augment.{name} is a probability; give 0 to 1")
        for name in ("gain_db", "low_pass_hz", "noise_snr_db"):
            low, high = getattr(self, name)
            require(low <= high, f"data.augment.{name}: the first value must not exceed the second")
        require(self.low_pass_hz[0] > 0, "data.augment.low_pass_hz must be positive")

    @property
    def any(self) -> bool:
        """Whether anything is ever changed."""
        return any((self.shift, self.polarity, self.gain, self.low_pass, self.noise))


@dataclass(frozen=True)
class FeaturesConfig(Strict):
    """What is read of a song's features, which a frozen network made of its consecutive windows."""

    size: int = 768
    """Values of a window."""
    max_windows: int = 126
    """Most windows of a row: 126 of 5 s and two zero vectors fill the 128 positions of CLaMP 3. Of a longer song a
    random run of so many is taken in training; in evaluation the head."""

    def __post_init__(self) -> None:
        for name in ("size", "max_windows"):
            require(getattr(self, name) >= 1, f"data.features.{name} must be at least 1")


@dataclass(frozen=True)
class DataConfig(Strict):
    train: tuple[str, ...] = ()
    """Training shards: paths or fsspec URLs (s3://, https://, ...), with braces ({0000..0099})
    and globs (*.tar)."""
    sources: tuple[SourceConfig, ...] = ()
    """Several training sources in place of `train`: a JSON file with a list of
    {"name", "shards", "weight", "templates"}. Each global batch holds a fixed share of each."""
    val: tuple[str, ...] = ()
    """Validation shards, in the form of `train`; may be empty (then the run ends without scores)."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems by protocol, such as {"s3": {"endpoint_url":
    ..., "profile": ..., "requester_pays": true}}. Only its path is saved, and every node of a worker must see it; its
    content is handed to decoding tasks and never written down."""
    read_timeout: float = 60.0
    """Seconds after which a stalled read from remote storage is broken off and tried again."""
    cache_folder: str = ""
    """Folder on each node for copies of remote shards and for decoded clips; "muser-cache" in the temporary folder
    when not given."""
    cache_gib: float = 64.0
    """GiB of copies of shards; those not used for longest make room. Holds at least a window's
    shards, or they are fetched again and again."""
    keep_clips: bool = False
    """Decodes and resamples clips whole, and keeps them on each node's disk: later passes, and other runs, decode
    nothing. Crops and augmentation come after it. Pays off from some passes on (docs/sweeps.md says how many). Crops
    begin at samples of the result in place of the file's, so they differ a little from those without."""
    clip_cache_gib: float = 64.0
    """GiB of such clips on each node; those not used for longest make room. A minute takes 2 MB at 16 kHz."""
    sample_rate: int = 16_000
    """Rate in Hz that every clip is resampled to."""
    crop_seconds: float = 5.0
    """Seconds of each clip that the audio towers see: a random crop in training, the middle
    in evaluation."""
    pad: Literal["zero", "repeat"] = "zero"
    """What follows a clip that is shorter than the crop: silence, or the clip again."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training crops."""
    spectrogram_on: Literal["device", "cpu"] = "device"
    """Where log-mel spectrograms are made: by the worker on its device, or by the decoding tasks
    (float16 through the object store, for devices that cannot spare the time)."""
    symbolic: SymbolicConfig = field(default_factory=SymbolicConfig)
    """What becomes of scores and MIDI, where the model has a tower that reads them."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """What is read of features of windows (KEY.npy), where the model has a tower that reads them."""
    templates: tuple[str, ...] = ("{caption}",)
    """Sentences over the metadata fields, one chosen per row and pass. A clause (between commas)
    that needs a missing field is left out. {captions:one} draws one entry of a list. Bars make lines:
    '{title} | {tags}' shows title and each tag in any order, some of them dropped (line_dropout). A template that comes
    twice is chosen twice as often."""
    field_dropout: float = 0.0
    """Probability with which each metadata field counts as missing, in training."""
    line_dropout: float = 0.0
    """Probability with which each line of a value of several lines, or of a template with bars, is left out, in
    training."""
    languages: tuple[str, ...] = ()
    """Where a value is an object {language: text}, the languages that are drawn from; all when empty."""
    label: str = ""
    """Metadata field whose value is a row's label, for objective.targets "same_label"."""
    classes: tuple[str, ...] = ()
    """Metadata fields of which a row has one value, such as genre, for objective "supervised": softmax cross-entropy.
    Rows that lack a field, or have several values of it, take no part in its loss."""
    tags: tuple[str, ...] = ()
    """Metadata fields with lists of values, such as tags, for objective "supervised": binary cross-entropy on each
    value. Rows that lack a field take no part in its loss."""
    label_values: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """By field of `classes` and `tags`, the values that are told apart: a JSON file such as {"genre": ["folk", "ska"]}.
    Of fields that it does not name they are found in the training metadata (labels.json in the run's folder)."""
    train_share: float = 1.0
    """Share of the training rows to train on, for few-shot curves: a random subset of each shard, which depends on
    the seed alone, and on all machines and numbers of workers alike."""
    pairs: str = ""
    """Pairs of songs that listeners like together, by the keys of their samples: what jobs/mine_pairs.py wrote, Parquet
    with trigger, item and weight. Rows come in pairs then: a song that has partners, each once a pass, and one of its
    partners, drawn by weight. Objectives contrast them as "partner" and "fused"."""
    partners_known: int = 32
    """Partners of each row that objective.exclude_liked knows of."""
    tokenizer: str = "words"
    """"words" (hashed words, needs no files) or a Hugging Face tokenizer: local path or name."""
    vocabulary: int = 16_384
    """Number of hash buckets of the "words" tokenizer; ignored for Hugging Face tokenizers."""
    max_tokens: int = 48
    """Tokens kept of each sentence."""
    window_shards: int = 8
    """Rows are shuffled inside windows of this many shards, whose order is shuffled too."""
    decode_slots: int = 2
    """Logical CPUs for reading and decoding: declared beside the workers' when the job starts
    Ray itself; a cluster that is already running must have at least one left."""
    max_decode_slots: int = 0
    """Most CPUs of a cluster that decode for this run, so that others find some; 0 takes all that workers leave."""
    buffer_mib: int = 1024
    """MiB of the object store that decoded chunks may fill until they are trained on; three chunks
    for each decoding slot and each worker where that is more."""
    max_bad_share: float = 0.2
    """Training stops when more than this share of the rows is quarantined (judged once 1,000 rows
    were read)."""

    @property
    def crop_samples(self) -> int:
        """Samples in a crop."""
        return round(self.sample_rate * self.crop_seconds)

    def label_kinds(self) -> dict[str, Literal["class", "tags"]]:
        """The fields that are learned, and whether a row has one or any number of their values."""
        return {**dict.fromkeys(self.classes, "class"), **dict.fromkeys(self.tags, "tags")}

    @property
    def tokenizer_folder(self) -> bool:
        """Whether the tokenizer comes from a folder, and not from the hub."""
        return self.tokenizer != "words" and Path(self.tokenizer).exists()

    def with_absolute_paths(self) -> "DataConfig":
        """The same with whole paths to what workers open by themselves: they run in other folders."""

        def of(path: str) -> str:
            return str(Path(path).resolve()) if path else ""

        return replace(
            self,
            storage_options=of(self.storage_options),
            cache_folder=of(self.cache_folder),
            tokenizer=of(self.tokenizer) if self.tokenizer_folder else self.tokenizer,
        )

    def training_sources(self) -> tuple[SourceConfig, ...]:
        """The sources of training: `sources`, or `train` as the only one."""
        return self.sources or ((SourceConfig("train", self.train),) if self.train else ())

    def __post_init__(self) -> None:
        require(self.sample_rate >= 1_000, f"data.sample_rate is {self.sample_rate} Hz; give at least 1000")
        require(self.crop_seconds > 0, f"data.crop_seconds is {self.crop_seconds}; give a positive length")
        require(len(self.templates) > 0, 'data.templates is empty; give at least one, such as "{caption}"')
        require(self.max_tokens >= 2, "data.max_tokens must be at least 2")
        require(self.partners_known >= 1, "data.partners_known must be at least 1")
        require(self.vocabulary >= 16, "data.vocabulary must be at least 16")
        require(self.decode_slots >= 1, "data.decode_slots must be at least 1, or nothing can be decoded")
        require(self.max_decode_slots >= 0, "data.max_decode_slots must not be negative")
        for name in ("window_shards", "buffer_mib", "read_timeout", "cache_gib"):
            require(getattr(self, name) > 0, f"data.{name} must be positive")
        require(self.clip_cache_gib >= 0, "data.clip_cache_gib must not be negative")
        for name in ("field_dropout", "line_dropout"):
            require(0 <= getattr(self, name) < 1, f"data.{name} is a probability below 1")
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share is a share; give 0 to 1")
        require(0 < self.train_share <= 1, "data.train_share is a share; give more than 0 and at most 1")
        fields = (*self.classes, *self.tags)
        require(len(set(fields)) == len(fields), f"data.classes and data.tags name a field twice: {', '.join(fields)}")
        for name, values in self.label_values.items():
            require(name in fields, f"data.label_values names {name}, which is not in data.classes or data.tags")
            require(len(values) > 0, f"data.label_values has no value of {name}")
        require(not (self.train and self.sources), "data: give `train` or `sources`, not both")
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), f"data.sources: names must differ, not {', '.join(names)}")
        for source in self.sources:
            require(
                bool(source.name) and source.name.replace("-", "").replace("_", "").isalnum(),
                f"data.sources: the name {source.name!r} must be of letters, digits, - and _",
            )
            require(source.weight > 0, f"data.sources: the weight of {source.name} must be positive")
            require(len(source.shards) > 0, f"data.sources: {source.name} names no shards")
