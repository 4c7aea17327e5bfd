"""PostgreSQL's `xid8` and `pg_snapshot` as model fields."""

from dataclasses import dataclass
from typing import Any

from django.db import models


@dataclass(frozen=True)
class PgSnapshot:
    """A PostgreSQL snapshot: which transactions are visible, i.e. had committed when it was taken.

    `xmin`: every transaction below it is visible. `xmax`: none from it on is. `xip`: in progress in between.
    """

    xmin: int
    xmax: int
    xip: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str) -> "PgSnapshot":
        """Parse PostgreSQL's text form `xmin:xmax:xip,xip`. Raises ValueError when it is not one."""
        xmin, xmax, xip = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in xip.split(",") if xid))

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(str(xid) for xid in sorted(self.xip))}"

    def sees(self, transaction_id: int) -> bool:
        """The same answer as `pg_visible_in_snapshot(transaction_id, self)`."""
        return transaction_id < self.xmax and transaction_id not in self.xip


NOTHING_SEEN = PgSnapshot(3, 3)
"""A snapshot that sees no transaction: 3 is the first transaction id that PostgreSQL hands out."""


def nothing_seen() -> PgSnapshot:
    """Default of a snapshot column (migrations can name a function, not a value of our own type)."""
    return NOTHING_SEEN


class Xid8Field(models.Field):  # type: ignore[type-arg]
    """A 64-bit transaction id, an int in Python."""

    description = "PostgreSQL transaction id (xid8)"

    def db_type(self, connection: Any) -> str:
        return "xid8"

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> int | None:
        return None if value is None else int(value)

    def to_python(self, value: Any) -> int | None:
        return None if value is None else int(value)

    def get_prep_value(self, value: Any) -> str | None:
        # There is no cast from a number to xid8, only from text.
        return None if value is None else str(int(value))


class PgSnapshotField(models.Field):  # type: ignore[type-arg]
    """A snapshot, a `PgSnapshot` in Python."""

    description = "PostgreSQL snapshot (pg_snapshot)"

    def db_type(self, connection: Any) -> str:
        return "pg_snapshot"

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> PgSnapshot | None:
        return None if value is None else PgSnapshot.parse(str(value))

    def to_python(self, value: Any) -> PgSnapshot | None:
        return value if value is None or isinstance(value, PgSnapshot) else PgSnapshot.parse(str(value))

    def get_prep_value(self, value: Any) -> str | None:
        return None if value is None else str(value)
