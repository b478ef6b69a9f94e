"""Money: whatever dies when, an answer that is written down is not paid again, and the cap holds."""

import shutil
import tempfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from muser_dist.errors import ConfigError, DataError
from muser_dist.refine.answers import Answer
from muser_dist.refine.ledger import UNIT, Answers, Ledger, Prices

CAP = 1000


class Spending(RuleBasedStateMachine):
    """Jobs that ask about a few items, die at any time, and go on; beside it the endpoint's own books."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.ledger = Ledger(self.folder / "ledger-0.sqlite", CAP)
        self.deaths = 0
        self.on_their_way: dict[int, tuple[str, int, int]] = {}  # number: digest, most, what the endpoint charges
        self.charged = 0
        self.charges: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()  # requests whose end nobody knows
        self.answers: set[str] = set()

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @rule(item=st.integers(0, 4), most=st.integers(0, 400), share=st.floats(0, 1))
    def ask(self, item: int, most: int, share: float) -> None:
        digest = f"item-{item}"
        if self.ledger.answered(digest) or any(digest == other for other, _, _ in self.on_their_way.values()):
            return
        before = self.ledger.spending.cost
        number = self.ledger.reserve(digest, most)
        assert (number is None) == (before + most > CAP)
        if number is not None:  # the endpoint charges as soon as it is asked, which is the worst for us
            cost = int(most * share)
            self.charged += cost
            self.charges[digest] += 1
            self.on_their_way[number] = (digest, most, cost)

    @precondition(lambda self: self.on_their_way)
    @rule(data=st.data(), end=st.sampled_from(["answer", "answer", "lost", "refused"]))
    def end(self, data: st.DataObject, end: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.on_their_way)))
        digest, _, cost = self.on_their_way.pop(number)
        if end == "answer":
            self.ledger.settle(number, cost, (1, 2), Answer("text", "stop"))
            self.answers.add(digest)
        elif end == "lost":
            self.ledger.settle(number, None)
            self.lost[digest] += 1
        else:  # an error status: it was not charged
            self.ledger.settle(number, 0)
            self.charged -= cost
            self.charges[digest] -= 1

    @rule()
    def die(self) -> None:
        """The power fails: what lies on the disk is all there is."""
        self.deaths += 1
        for digest, _, _ in self.on_their_way.values():
            self.lost[digest] += 1
        self.on_their_way.clear()
        new = self.folder / f"ledger-{self.deaths}.sqlite"
        for suffix in ("", "-wal"):
            old = Path(f"{self.ledger.path}{suffix}")
            if old.exists():
                shutil.copy(old, f"{new}{suffix}")
        self.ledger.close()
        self.ledger = Ledger(new, CAP)

    @invariant()
    def the_cap_holds(self) -> None:
        assert self.charged <= self.ledger.spending.cost <= CAP

    @invariant()
    def nothing_is_paid_twice_but_what_was_on_its_way(self) -> None:
        for digest, charges in self.charges.items():
            underway = sum(digest == other for other, _, _ in self.on_their_way.values())
            assert charges <= self.lost[digest] + underway + (digest in self.answers)

    @invariant()
    def answers_stay(self) -> None:
        assert all(self.ledger.answered(f"item-{item}") == (f"item-{item}" in self.answers) for item in range(5))


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=30, stateful_step_count=30)


@pytest.mark.parametrize("cap", [0, 1])
def test_with_a_cap_of_0_nothing_is_asked_even_where_it_is_free(tmp_path, cap):
    ledger = Ledger(tmp_path / "ledger.sqlite", cap)
    assert (ledger.reserve("item", Prices.per_million(0, 0).cost(100, 100)) is None) == (cap == 0)
    ledger.close()


def test_what_is_written_down_can_be_read(tmp_path):
    path = tmp_path / "a folder?#" / "ledger.sqlite"
    path.parent.mkdir()
    ledger = Ledger(path, 100)
    assert not ledger.any_answer
    numbers = [ledger.reserve(digest, 40) for digest in ("good", "bad")]
    assert ledger.reserve("beyond", 21) is None
    ledger.settle(numbers[0], 7, (3, 4), Answer("été", "stop"))
    ledger.settle(numbers[1], None, None)
    ledger.fail("bad", "no reply")
    ledger.fail("bad", "no reply again")
    assert vars(ledger.spending) == {"requests": 2, "input": 3, "output": 4, "cost": 47, "presumed": 40}
    ledger.close()
    answers = Answers(path)
    assert answers.get("good") == Answer("été", "stop")
    assert answers.get("bad") == "no reply again"
    assert answers.get("beyond") is None
    answers.close()
    again = Ledger(path, 100)
    assert vars(again.spending) == {"requests": 2, "input": 3, "output": 4, "cost": 47, "presumed": 40}
    assert again.answered("good") and not again.answered("bad") and again.any_answer
    again.close()
    answers = Answers(path)
    assert answers.get("bad") is None  # another job tries again
    answers.close()


def test_one_job_at_a_time_and_no_broken_file(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite", 0)
    with pytest.raises(DataError, match="another job works in that folder"):
        Ledger(tmp_path / "ledger.sqlite", 0)
    ledger.close()
    Ledger(tmp_path / "ledger.sqlite", 0).close()
    (tmp_path / "broken.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="is broken"):
        Ledger(tmp_path / "broken.sqlite", 0)
    with pytest.raises(DataError, match="every node must see"):
        Answers(tmp_path / "missing.sqlite")


def test_prices_are_exact_and_rounded_up():
    prices = Prices.per_million(0.15, 0.6)
    assert prices.cost(1_000_000, 0) == 15 * UNIT // 100
    assert prices.cost(0, 1_000_000) == 6 * UNIT // 10
    odd = 1e-7
    assert Decimal(Prices.per_million(odd, 0).cost(10**6, 0)) >= Decimal(str(odd)) * UNIT
    assert Prices.per_million(0, 0).cost(10**6, 10**6) == 0
    for wrong in (-1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ConfigError, match="--price-out"):
            Prices.per_million(1.0, wrong)
