"""SymbolicConfig: what a run's config says about notation."""

from dataclasses import dataclass
from typing import Literal

from muser_dist.errors import require
from muser_dist.strict import Strict

Notation = Literal["abc", "midi"]


@dataclass(frozen=True)
class SymbolicConfig(Strict):
    """How scores and MIDI become patches.

    The random numbers come from the plan: (seed, pass, row) decide them.
    """

    notations: tuple[Notation, ...] = ("abc", "midi")
    """What is read of a row: "abc" (also MusicXML, which becomes ABC), "midi". Of those that a row has, one is drawn in
    training, and the first is taken in evaluation."""
    headers: tuple[str, ...] = ("M", "L", "K", "Q", "V", "P")
    """Header fields of ABC that reach the encoder, in the music too. Titles, names and dances (X, T, C, R, ...) hold
    what a text says, so that a model which sees them learns to read, not music. Of these six only what is notation is
    kept; of any other the whole line."""
    drop_instruments: float = 0.9
    """Probability of hiding instruments in training: names of ABC's voices, programs of MIDI. At 1 evaluation hides
    them too."""
    max_patches: int = 512
    """Most patches of a row, its first and last included. Of longer music the head, the tail or a window between is
    drawn in training; in evaluation the head is taken."""
    max_bytes: int = 4 << 20
    """Larger members, and MusicXML that unpacks to more, are quarantined."""
    max_events: int = 500_000
    """MIDI of more events, and MusicXML of more elements, is quarantined."""

    def __post_init__(self) -> None:
        require(len(self.notations) > 0, 'data.symbolic.notations is empty; give "abc", "midi" or both')
        require(len(set(self.notations)) == len(self.notations), "data.symbolic.notations names one twice")
        for name in self.headers:
            require(
                len(name) == 1 and "A" <= name <= "Z",
                f"data.symbolic.headers: {name!r} is no header field of ABC; give single letters, such as K",
            )
        require(0 <= self.drop_instruments <= 1, "data.symbolic.drop_instruments is a probability; give 0 to 1")
        require(self.max_patches >= 4, "data.symbolic.max_patches must be at least 4")
        for name in ("max_bytes", "max_events"):
            require(getattr(self, name) > 0, f"data.symbolic.{name} must be positive")
