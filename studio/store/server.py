"""PostgreSQL: its address, its connections, what is asked of a server."""

from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from studio.errors import InputError, MachineError

# Any number will do, as long as nobody else locks it in the same database: "delta", in letters.
WRITERS_LOCK = 0x64656C7461
OLDEST_SERVER = 13
_CONNECT_SECONDS = 10
_IDLE_SECONDS = 60


def parse_url(url: str) -> URL:
    """Return a `postgresql://` URL for psycopg 3.

    Raises:
        InputError: It is none; the message does not repeat it, as it may hold a password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise InputError(
            "The database URL is not understood.",
            "Write postgresql://USER:PASSWORD@HOST:PORT/NAME, or leave it empty for SQLite in the "
            "home folder.",
            field="database_url",
        )
    return parsed.set(drivername="postgresql+psycopg")


def address_of(url: URL) -> str:
    """Return where a server is, for people: no password, no options."""
    user = f"{url.username}@" if url.username else ""
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{user}{url.host or 'localhost'}{port}/{url.database or ''}"


def connect(url: URL, busy_seconds: float) -> Engine:
    """Return an engine; nothing is connected yet.

    A connection is tried before it is used, so that those of before a restart of the server are
    replaced unseen. A program that stands still within a transaction is cut off by the server:
    it would hold up every writer and keep old rows alive.
    """
    engine = create_engine(
        url,
        pool_pre_ping=True,
        max_overflow=20,
        hide_parameters=True,  # errors end in logs; the values are people's texts and tokens
        connect_args={
            "connect_timeout": _CONNECT_SECONDS,
            "application_name": "delta-studio",
            "client_encoding": "utf8",
            # A server that is gone without a word is noticed within a Lease.
            "keepalives_idle": 5,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        },
    )

    def begin(connection: Any, _: object) -> None:
        connection.autocommit = True
        connection.execute(f"SET lock_timeout = '{round(busy_seconds * 1000)}ms'")
        connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'")
        connection.autocommit = False

    event.listen(engine, "connect", begin)
    return engine


def line_up(connection: Connection) -> None:
    """Wait until no other transaction writes; held until this one ends, however it ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITERS_LOCK})


def version_of(connection: Connection) -> str:
    """Return the server's version."""
    return str(connection.execute(text("SHOW server_version")).scalar_one()).split()[0]


def refuse_unfit(connection: Connection, address: str) -> None:
    """See that a server can hold the tables.

    Raises:
        MachineError: It is too old, or its database does not keep text as UTF-8.
    """
    version = version_of(connection)
    if int(version.split(".")[0]) < OLDEST_SERVER:
        raise MachineError(
            f"The database server {address} is PostgreSQL {version}; {OLDEST_SERVER} is needed.",
            "Upgrade it, or leave STUDIO_DATABASE_URL empty for SQLite in the home folder.",
        )
    encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
    if encoding != "UTF8":
        raise MachineError(
            f"The database {address} keeps its text as {encoding}, not as UTF8.",
            "Create one with: createdb --encoding=UTF8 --template=template0 NAME",
        )
