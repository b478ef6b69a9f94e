"""ObjectiveConfig: what is contrasted with what, and by which loss."""

from dataclasses import dataclass, field
from typing import Literal, cast

from muser_dist.errors import require
from muser_dist.models.config import Modality
from muser_dist.strict import Strict

Feature = Literal["audio", "spectrogram", "symbolic", "features", "text", "view", "notation", "partner", "fused"]
"""What pairs contrast: a tower's modality; "view", another crop of the same clip, drawn and augmented apart, which
the audio tower and its head embed too; "notation", another notation of the same piece (of ABC and MIDI the other one),
which the symbolic tower and its head embed too; or, where rows come in pairs of songs that listeners like together
(data.pairs), "partner", the other modality of the pair as the other song has it, and "fused", that song's fusion with
its text."""

TOWER_OF: dict[str, Modality] = {"view": "audio", "notation": "symbolic"}
"""Of features that a tower embeds besides its own modality, the tower."""

WITHOUT_PAIRS = ("supervised", "masked_patches")
"""Objectives that contrast nothing."""


@dataclass(frozen=True)
class PairConfig(Strict):
    first: Feature
    """One modality of the pair."""
    second: Feature
    """The other one; both directions are trained. "view" is another crop of the clip, for the audio tower: with audio
    as the other one, rows of the anchor's own view are negatives too (NT-Xent), and only the row itself is a match.
    "notation" with symbolic is contrasted as any two modalities, and only the row itself is a match.
    "partner" and "fused" are of the song that is liked together with the row's; only that song is a match."""
    weight: float = 1.0
    """Share of this pair in the loss; weights are divided by their sum."""

    @property
    def of_views(self) -> bool:
        """Whether the pair is of two views of one clip through one tower."""
        return {self.first, self.second} == {"audio", "view"}

    @property
    def of_one(self) -> bool:
        """Whether the pair is of two forms of one clip or piece, so that only the row itself is a match."""
        return self.of_views or {self.first, self.second} == {"symbolic", "notation"}

    @property
    def towers(self) -> tuple[Modality, Modality]:
        """The modalities whose towers embed the two."""
        first = TOWER_OF.get(self.first, self.first)
        second = {**TOWER_OF, "partner": first, "fused": "text"}.get(self.second, self.second)
        return cast(Modality, first), cast(Modality, second)

    @property
    def of_songs(self) -> bool:
        """Whether the pair is of two songs that are liked together."""
        return self.second in ("partner", "fused")


@dataclass(frozen=True)
class TemperatureConfig(Strict):
    init: float = 0.07
    """Temperature at the start; similarities are divided by it."""
    learnable: bool = True
    """Whether it is trained."""
    minimum: float = 0.01
    """Lowest temperature (similarities are multiplied by at most its inverse)."""
    maximum: float = 100.0
    """Highest temperature."""
    shared: bool = False
    """One temperature for all pairs instead of one for each."""

    def __post_init__(self) -> None:
        require(
            0 < self.minimum <= self.init <= self.maximum,
            f"objective.temperature: need 0 < minimum <= init <= maximum, not minimum {self.minimum}, "
            f"init {self.init} and maximum {self.maximum}",
        )


@dataclass(frozen=True)
class ObjectiveConfig(Strict):
    name: str = "contrastive"
    """"contrastive" (symmetric InfoNCE), "decoupled", "sigmoid", "debiased", "similarity_weighted", "muser_poster",
    "muser_code", "supervised" (fields of data.classes and data.tags; one tower and no pairs), "masked_patches" (of
    notation; the tower m3_pretraining and no pairs) (docs/objective.md), or your own objective as
    "package.module:function"."""
    options: dict[str, float] = field(default_factory=dict)
    """Further numbers of the objective, as NAME VALUE: "debiased" takes tau_plus and beta, "similarity_weighted"
    kappa."""
    pairs: tuple[PairConfig, ...] = (PairConfig("audio", "text"), PairConfig("spectrogram", "text"))
    """Modalities that are contrasted with each other."""
    targets: Literal["instance", "same_text", "same_label"] = "same_text"
    """What counts as a match: only the row itself, every row whose text states the same facts, or every row
    with the same value of data.label."""
    exclude_same_text: bool = False
    """Leaves rows whose text states the same facts out of the negatives where they are no match."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of the softmax."""
    bias: float | None = None
    """Start of a learned bias of all similarities, one for each pair; "sigmoid" needs it (SigLIP: -10)."""
    normalise: bool = True
    """Compares by cosine; without, by the dot product of the embeddings as they are (CLaMP 2 and 3)."""
    exclude_liked: bool = False
    """In pairs of songs, leaves songs that listeners like together with the anchor's (data.pairs) out of its negatives.
    It knows of the data.partners_known likeliest of each song."""
    dims: tuple[int, ...] = ()
    """Trains these many leading dimensions of the embedding as embeddings of their own (Matryoshka)."""
    bf16: bool = False
    """Rounds embeddings to bfloat16 before they are gathered and compared: half of the traffic, and tensor cores.
    Sums stay float32."""
    gather_mib: int = 4096
    """MiB of gathered embeddings that a worker may hold; above, blocks of them travel in a ring instead."""

    @property
    def embeds(self) -> bool:
        """Whether towers give embeddings in training."""
        return self.name != "masked_patches"

    @property
    def needs_notation(self) -> bool:
        """Whether a row that has no other notation is of no use."""
        return bool(self.pairs) and all("notation" in (pair.first, pair.second) for pair in self.pairs)

    @property
    def reads_text(self) -> bool:
        """Whether it matters which rows' texts state the same facts."""
        return bool(self.pairs) and (self.targets == "same_text" or self.exclude_same_text)

    def __post_init__(self) -> None:
        require(
            self.name not in WITHOUT_PAIRS or not self.pairs,
            f'objective.name: "{self.name}" contrasts nothing; take a recipe without pairs, such as muser_audio_only',
        )
        require(
            len(self.pairs) > 0 or self.name in WITHOUT_PAIRS or ":" in self.name,
            "objective.pairs is empty; name at least one pair of modalities",
        )
        require(
            self.name != "sigmoid" or not any(pair.of_views for pair in self.pairs),
            "objective.pairs: the sigmoid loss does not contrast audio with its view; take contrastive",
        )
        for pair in self.pairs:
            require(pair.first != pair.second, f"objective.pairs contrasts {pair.first} with itself")
            require(
                pair.first not in ("partner", "fused")
                and not (pair.of_songs and pair.first not in ("audio", "spectrogram")),
                f"objective.pairs: {pair.first}-{pair.second}: give audio or spectrogram first, then partner or fused",
            )
            require(pair.weight > 0, f"objective.pairs: the weight of {pair.first}-{pair.second} must be positive")
        named = [{pair.first, pair.second} for pair in self.pairs]
        require(all(named.count(pair) == 1 for pair in named), "objective.pairs names a pair twice; give it a weight")
        require(
            self.name != "sigmoid" or self.bias is not None,
            "objective.bias: the sigmoid loss needs a bias; SigLIP starts at -10",
        )
        require(
            not self.exclude_liked or any(pair.of_songs for pair in self.pairs),
            "objective.exclude_liked: no pair of objective.pairs is of two songs (partner or fused); leave it out",
        )
        require(
            self.bias is None or self.name == "sigmoid" or ":" in self.name,
            f"objective.bias means nothing to {self.name!r}; only the sigmoid loss has one",
        )
        require(all(dim >= 1 for dim in self.dims), "objective.dims: a number of dimensions must be at least 1")
        require(len(set(self.dims)) == len(self.dims), "objective.dims: numbers of dimensions must differ")
        require(self.gather_mib >= 0, "objective.gather_mib must not be negative")
