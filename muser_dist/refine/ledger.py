"""What was asked, what it cost, and what came back: a SQLite file that survives whatever happens to the job.

A request is written down before it is sent, with the most that it may cost, and again when it has ended, with what it
did cost and its answer, in one transaction. What has no end counts at its most, whether it is on its way or was when
a process died: so spending is never more than `spent` says, and an answer that is written down is not paid again.

Money is counted in whole numbers of 10^-12 of the currency, so that sums are exact.
"""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from muser_dist.errors import DataError, require
from muser_dist.refine.answers import Answer

UNIT = 10**12
"""Units of money in one of the currency."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, reserved INTEGER NOT NULL, cost INTEGER, input INTEGER, output INTEGER
);
CREATE TABLE IF NOT EXISTS answers (digest TEXT PRIMARY KEY, content TEXT NOT NULL, finish TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (digest TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Prices:
    """What tokens cost, in units of money each."""

    input: int
    output: int

    @staticmethod
    def per_million(input: float, output: float) -> "Prices":
        """Prices in the currency per million tokens, as providers list them.

        Raises:
            ConfigError: one is negative or absurd.
        """
        for name, price in (("--price-in", input), ("--price-out", output)):
            require(0 <= price <= 10_000, f"{name} is {price}; give what a million tokens cost, from 0 to 10,000")
        # Rounded up: the cap holds for what is really paid.
        return Prices(*(math.ceil(Decimal(str(price)) * UNIT / 10**6) for price in (input, output)))

    def cost(self, input: int, output: int) -> int:
        """Units that so many tokens of input and output cost."""
        return self.input * input + self.output * output


@dataclass(frozen=True)
class Spending:
    """What requests have cost.

    Attributes:
        requests: how many were sent.
        input, output: tokens, as far as the endpoint told.
        cost: units of money, with what follows.
        presumed: units of money of requests of which it is not known whether they were paid: they count at their most.
    """

    requests: int
    input: int
    output: int
    cost: int
    presumed: int


class Ledger:
    """The ledger of a job, which no other process may use meanwhile.

    Args:
        path: the file; made when missing.
        cap: units of money that may be spent, with all that was spent before.

    Raises:
        DataError: the file is broken, or another process uses it.
    """

    def __init__(self, path: Path, cap: int) -> None:
        self.path = path
        self.cap = cap
        with self._explained():
            self._db = sqlite3.connect(path, timeout=0)
            # With the file to itself SQLite needs no shared memory, which network file systems lack.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # written down means: on the disk
            self._db.executescript(_SCHEMA)
            with self._db:
                self._db.execute("DELETE FROM failures")  # another try may end otherwise
            told = "COALESCE(SUM(input), 0), COALESCE(SUM(output), 0)"
            money = "COALESCE(SUM(COALESCE(cost, reserved)), 0)"
            presumed = "COALESCE(SUM(CASE WHEN cost IS NULL THEN reserved ELSE 0 END), 0)"
            row = self._db.execute(f"SELECT COUNT(*), {told}, {money}, {presumed} FROM requests").fetchone()
        self._spending = Spending(*row)
        self._open: dict[int, int] = {}  # reserved by the requests of this process that have not ended

    @property
    def spending(self) -> Spending:
        """What was spent in all, of which requests on their way are a part, at their most."""
        return self._spending

    def answered(self, digest: str) -> bool:
        """Whether the answer to a request is there."""
        return self._db.execute("SELECT 1 FROM answers WHERE digest = ?", (digest,)).fetchone() is not None

    @property
    def any_answer(self) -> bool:
        """Whether there is an answer to anything."""
        return self._db.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is not None

    def reserve(self, digest: str, most: int) -> int | None:
        """Writes down that a request is about to be sent.

        Args:
            digest: of the request.
            most: units that it may cost.

        Returns:
            its number; None where the cap leaves no room for it, and it must not be sent. A cap of 0 leaves none for
            what costs nothing either.
        """
        if self.cap == 0 or self._spending.cost + most > self.cap:
            return None
        with self._explained(), self._db:
            row = self._db.execute("INSERT INTO requests (digest, reserved) VALUES (?, ?)", (digest, most))
        number = row.lastrowid
        assert number is not None
        self._open[number] = most
        self._add(requests=1, cost=most, presumed=most)
        return number

    def settle(
        self, number: int, cost: int | None, tokens: tuple[int, int] | None = None, answer: Answer | None = None
    ) -> None:
        """Writes down how a request ended.

        Args:
            number: of `reserve`.
            cost: units that it did cost; None where that is not known.
            tokens: of input and output, where the endpoint told.
            answer: what came back, if it is worth keeping.
        """
        most = self._open.pop(number)
        input, output = tokens or (0, 0)
        with self._explained(), self._db:
            self._db.execute(
                "UPDATE requests SET cost = ?, input = ?, output = ? WHERE id = ?", (cost, input, output, number)
            )
            if answer is not None:
                self._db.execute(
                    "INSERT INTO answers SELECT digest, ?, ? FROM requests WHERE id = ?",
                    (answer.content, answer.finish, number),
                )
        if cost is not None:
            self._add(cost=cost - most, presumed=-most)
        self._add(input=input, output=output)

    def fail(self, digest: str, reason: str) -> None:
        """Writes down why a request has no answer; the next job tries again."""
        with self._explained(), self._db:
            self._db.execute("INSERT OR REPLACE INTO failures VALUES (?, ?)", (digest, reason))

    def close(self) -> None:
        """Ends the use of the file; `Answers` may read it then."""
        self._db.close()

    def _add(self, **counts: int) -> None:
        self._spending = Spending(**{name: value + counts.get(name, 0) for name, value in vars(self._spending).items()})

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise DataError(f"{self.path} is in use: another job works in that folder; wait, or end it") from None
            raise DataError(f"{self.path} cannot be written ({error}); check the folder and its disk") from None
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path} is broken ({error}). It holds what was paid for: bring back a copy, or give another --out"
            ) from None


class Answers:
    """The answers in a ledger that no process writes to; any number of machines may read.

    Args:
        path: of the ledger.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            self._db.execute("SELECT 1 FROM answers LIMIT 1")
        except sqlite3.Error as error:
            raise DataError(f"{path} cannot be read ({error}); every node must see the folder --out") from None

    def get(self, digest: str) -> Answer | str | None:
        """The answer to a request; or why there is none, where it was asked and failed; or None."""
        if row := self._db.execute("SELECT content, finish FROM answers WHERE digest = ?", (digest,)).fetchone():
            return Answer(*row)
        row = self._db.execute("SELECT reason FROM failures WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row else None

    def close(self) -> None:
        """Closes the file."""
        self._db.close()
