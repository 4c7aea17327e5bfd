"""Every query of every database connection, timed and counted, and a span of it where there is a trace.

Seen is what goes through Django's cursors, savepoints and `executemany()` included. Of a server-side cursor it is the
statement that opens it, not the fetching. COPY and stored procedures go past Django: see `timed()`. So do BEGIN,
COMMIT and ROLLBACK on most databases.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

from django.apps import apps
from django.conf import settings
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode
from prometheus_client import Counter, Histogram

from monitoring.conf import service_name
from monitoring.labels import OTHER
from monitoring.metrics import DB_QUERY_ERRORS, DB_QUERY_SECONDS
from monitoring.tracing import trace_done

logger = logging.getLogger(__name__)
_tracer = trace.get_tracer(__name__)

_PARSED_STATEMENTS = 1_000
_PARSED_CHARS = 8_000  # of a statement: in longer ones the table comes early, or is not looked for
_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?\*/          # comments
      | '(?:[^'\\]|''|\\.)*'        # text
      | \$(\w*)\$.*?\$\1\$          # text, dollar-quoted
      | ("(?:[^"]|"")*"|`[^`]*`)    # 2: quoted names
      | ([^\W\d]\w*)                # 3: words
      | ([().,;])                   # 4: what gives the statement its shape
    """,
    re.VERBOSE | re.DOTALL,
)
_MAIN_VERBS = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "MERGE"})
_BEFORE_TABLE = {"SELECT": "FROM", "DELETE": "FROM", "INSERT": "INTO", "REPLACE": "INTO", "MERGE": "INTO"}
# fmt: off
_NO_TABLE = frozenset({
    "BEGIN", "START", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET", "RESET", "SHOW", "LISTEN", "UNLISTEN",
    "NOTIFY", "FETCH", "CLOSE", "CALL", "DO", "VACUUM", "PRAGMA", "DISCARD", "DEALLOCATE", "PREPARE", "EXECUTE",
})
_ANY_TABLE = frozenset({
    "CREATE", "ALTER", "DROP", "TRUNCATE", "LOCK", "COPY", "ANALYZE", "EXPLAIN", "DECLARE", "REINDEX",
    "COMMENT", "GRANT",
})
# fmt: on
_BETWEEN = frozenset({"ONLY", "LATERAL", "TABLE", "IGNORE", "OR", "REPLACE", "ABORT", "FAIL", "ROLLBACK"})
_SYSTEM_NAMES = {"sqlite": "sqlite", "oracle": "oracle.db", "microsoft": "microsoft.sql_server"}  # else the vendor's


class Statement(NamedTuple):
    """`operation`: its verb, upper-case, or `other`. `table`: a known one, `other`, or empty where it has none."""

    operation: str
    table: str


def install() -> None:
    """Observe the queries of every connection of this process, present and future; once each."""
    connection_created.connect(_observe_connection, dispatch_uid="monitoring.database")
    for connection in connections.all(initialized_only=True):
        _observe_connection(connection=connection)


def _observe_connection(*, connection: BaseDatabaseWrapper, **_: object) -> None:
    # The signal comes with each reconnect. First in the list: `connection.execute_wrapper()` takes back the last.
    if observe_query not in connection.execute_wrappers:
        connection.execute_wrappers.insert(0, observe_query)


def observe_query(execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: dict[str, Any]) -> Any:
    """Django's execute wrapper: run the query, record it. Recording never fails it."""
    started = time.perf_counter()
    try:
        result = execute(sql, params, many, context)
    except Exception as error:
        _record(context["connection"], sql, started, params if many else None, error)
        raise
    _record(context["connection"], sql, started, params if many else None, None)
    return result


@contextmanager
def timed(connection: BaseDatabaseWrapper, sql: str) -> Iterator[None]:
    """Record a statement that Django's cursors do not see, such as a COPY by the driver's own cursor."""
    started = time.perf_counter()
    try:
        yield
    except Exception as error:
        _record(connection, sql, started, None, error)
        raise
    _record(connection, sql, started, None, None)


def _record(connection: BaseDatabaseWrapper, sql: Any, started: float, many: Any, error: Exception | None) -> None:
    try:
        seconds = time.perf_counter() - started
        statement = parsed(sql[:_PARSED_CHARS] if isinstance(sql, str) else _text(sql))
        series = _series(service_name(), statement)
        series.seconds.observe(seconds)
        if error is not None:
            series.errors.inc()
        # No trace begins with a query: a worker that polls would make one each time.
        if trace.get_current_span().is_recording():
            size = len(many) if hasattr(many, "__len__") else 0
            make = partial(_make_span, connection.alias, statement, seconds, time.time_ns(), size, error)
            if error is None:
                trace_done(make)
            else:
                make(None)
    except Exception:  # a full disk under the shared metrics must not become a failed query
        logger.exception("a query could not be recorded")


class _Series(NamedTuple):
    seconds: Histogram
    errors: Counter


@lru_cache(10_000)
def _series(service: str, statement: Statement) -> _Series:
    return _Series(DB_QUERY_SECONDS.labels(service, *statement), DB_QUERY_ERRORS.labels(service, *statement))


def _make_span(
    alias: str,
    statement: Statement,
    seconds: float,
    ended_ns: int,
    batch_size: int,
    error: Exception | None,
    parent: Context | None,
) -> None:
    """After OpenTelemetry's conventions for databases. Neither the statement's text nor its parameters are in it."""
    name = " ".join(filter(None, statement))
    attributes = {**_place(alias), "db.operation.name": statement.operation, "db.query.summary": name}
    if statement.table:
        attributes["db.collection.name"] = statement.table
    if batch_size > 1:  # the conventions: a batch of one is none
        attributes["db.operation.batch.size"] = batch_size
    span = _tracer.start_span(
        name, parent, SpanKind.CLIENT, attributes, start_time=ended_ns - int(seconds * 1_000_000_000)
    )
    if error is not None:
        # Not the error's text, which quotes the row.
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        span.set_attribute("error.type", f"{type(error).__module__}.{type(error).__qualname__}")
        if code := getattr(error.__cause__, "sqlstate", None):
            span.set_attribute("db.response.status_code", code)
    span.end(ended_ns)


@cache
def _place(alias: str) -> dict[str, Any]:
    """What all spans of a database have in common."""
    database = connections[alias].settings_dict
    vendor = connections[alias].vendor
    place: dict[str, Any] = {"db.system.name": _SYSTEM_NAMES.get(vendor, vendor)}
    if getattr(connections[alias], "mysql_is_mariadb", False):
        place["db.system.name"] = "mariadb"
    if database.get("NAME"):
        place["db.namespace"] = str(database["NAME"])
    host = str(database.get("HOST") or "")
    if host and not host.startswith("/"):
        place["server.address"] = host
        if str(database.get("PORT") or "").isdigit():
            place["server.port"] = int(database["PORT"])
    return place


@lru_cache(_PARSED_STATEMENTS)
def parsed(sql: str) -> Statement:
    """What a statement does to which table."""
    tokens = _tokens(sql)
    verb = next((word for depth, word, _ in tokens if word), "")
    if verb == "WITH":
        # The statement proper follows the subqueries, which stand in brackets.
        verb = next((word for depth, word, _ in tokens if depth == 0 and word in _MAIN_VERBS), "")
    if verb in _BEFORE_TABLE:
        return Statement(verb, _table_after(_BEFORE_TABLE[verb], tokens))
    if verb == "UPDATE":
        return Statement(verb, _table_here(tokens))
    if verb in _NO_TABLE:
        return Statement(verb, "")
    if verb in _ANY_TABLE:
        known = _known_tables()
        return Statement(verb, next((known[n] for _, _, n in tokens if n in known), ""))
    return Statement(OTHER, OTHER)


Token = tuple[int, str, str]
"""Depth of brackets, the word in upper case (empty for others), the name in lower case without quotes."""


def _tokens(sql: str) -> Iterator[Token]:
    depth = 0
    for token in _TOKEN.finditer(sql):
        _, quoted, word, mark = token.groups()
        if word:
            yield depth, word.upper(), word.lower()
        elif quoted:
            yield depth, "", quoted[1:-1].lower()
        elif mark == "(":
            yield depth, "", "("
            depth += 1
        elif mark == ")":
            depth -= 1
            yield depth, "", ")"
        elif mark:
            yield depth, "", mark


def _table_after(keyword: str, tokens: Iterator[Token]) -> str:
    """The table after a keyword; of `FROM (SELECT ...)` the one in there."""
    at, before = None, ""
    for depth, word, _ in tokens:
        at = depth if at is None else min(at, depth)  # a union's first part may stand in brackets of its own
        if word == keyword and depth == at and before != "DISTINCT":
            table = _table_here(tokens)
            if table != "(":
                return table
            at = depth + 1
        before = word
    return ""


def _table_here(tokens: Iterator[Token]) -> str:
    """The table that the next tokens name, or "(" where a subquery begins."""
    name = ""
    for _, word, text in tokens:
        if text == "(" and not name:
            return "("
        if word in _BETWEEN and not name:
            continue
        if text == ".":
            name = "."
        elif not name or name == ".":
            name = text  # after a dot: what stood before was the schema
        else:
            break
    return _known_tables().get(name, OTHER) if name else ""


@cache
def _known_tables() -> dict[str, str]:
    """The tables of the installed models by their name in lower case: some databases fold names."""
    names = {model._meta.db_table for model in apps.get_models(include_auto_created=True, include_swapped=True)}
    names |= {"django_migrations"}
    for backend in settings.CACHES.values():
        if backend.get("BACKEND", "").endswith(".DatabaseCache"):
            names.add(str(backend.get("LOCATION", "")))
    return {name.rpartition(".")[2].strip('"`').lower(): name for name in names}


def _text(sql: Any) -> str:
    """Of what the driver composes itself: psycopg's SQL objects, bytes."""
    if isinstance(sql, bytes):
        return sql[:_PARSED_CHARS].decode("utf-8", "replace")
    as_string = getattr(sql, "as_string", None)
    return str(as_string(None))[:_PARSED_CHARS] if as_string else str(sql)[:_PARSED_CHARS]
