"""What SQLite and PostgreSQL write differently."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Integer, Select, column, func, literal, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

# SQLite's integers have 64 bits whatever they are called, and number rows by themselves only
# where the type is called INTEGER; PostgreSQL's INTEGER ends at 2 GiB.
WHOLE_NUMBER = BigInteger().with_variant(Integer(), "sqlite")


def is_sqlite(session: Session) -> bool:
    """Tell whether a session is one of SQLite."""
    return session.get_bind().dialect.name == "sqlite"


def insert(session: Session, table: Any) -> sqlite.Insert | postgresql.Insert:
    """Return an INSERT that knows ON CONFLICT."""
    return sqlite.insert(table) if is_sqlite(session) else postgresql.insert(table)


def each_number(session: Session, numbers: Sequence[int]) -> Select[tuple[int]]:
    """Return a query of numbers that are one value of the statement, however many they are."""
    if is_sqlite(session):
        each = func.json_each(json.dumps(list(numbers))).table_valued(column("value", Integer))
        return select(each.c.value)
    array = literal(list(numbers), postgresql.ARRAY(BigInteger))
    return select(func.unnest(array, type_=BigInteger).column_valued("value"))
