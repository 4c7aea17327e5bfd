"""Every query is timed and counted once, by what it does to which table, and is a span where there is a trace."""

import threading

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.contenttypes.models import ContentType
from django.db import DatabaseError, IntegrityError, connection, transaction
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import REGISTRY
from psycopg import sql

from monitoring import database
from monitoring.database import observe_query, parsed, timed

from .conftest import counted

TABLE = "django_content_type"


@pytest.mark.parametrize(
    ("statement", "operation", "table"),
    [
        ("SELECT 1", "SELECT", ""),
        ("SELECT pg_try_advisory_lock(1)", "SELECT", ""),
        (f'SELECT "{TABLE}"."id" FROM "{TABLE}" WHERE id = %s', "SELECT", TABLE),
        (f"select * from {TABLE}", "SELECT", TABLE),
        (f"  -- a comment: FROM nowhere\n/* FROM nowhere */ SELECT * FROM {TABLE}", "SELECT", TABLE),
        (f"SELECT 'FROM nowhere, it''s', \"FROM\", $$FROM x$$ FROM {TABLE}", "SELECT", TABLE),
        (f"SELECT EXTRACT(YEAR FROM now()), a IS DISTINCT FROM b FROM {TABLE}", "SELECT", TABLE),
        (f"SELECT (SELECT x FROM nowhere LIMIT 1) AS y FROM {TABLE}", "SELECT", TABLE),
        (f"SELECT COUNT(*) FROM (SELECT DISTINCT (SELECT 1 FROM a) FROM {TABLE}) subquery", "SELECT", TABLE),
        (f"(SELECT a FROM {TABLE}) UNION (SELECT b FROM nowhere)", "SELECT", TABLE),
        (f'SELECT * FROM "public"."{TABLE}" t', "SELECT", TABLE),
        (f"SELECT * FROM ONLY {TABLE}", "SELECT", TABLE),
        (f"SELECT * FROM `{TABLE}`", "SELECT", TABLE),  # MySQL
        (f'SELECT * FROM "{TABLE.upper()}"', "SELECT", TABLE),  # Oracle
        ("SELECT * FROM generate_series(1, 2)", "SELECT", "other"),
        ("SELECT * FROM pg_stat_activity", "SELECT", "other"),
        (f"INSERT INTO {TABLE} (a) SELECT b FROM nowhere", "INSERT", TABLE),
        (f"INSERT OR IGNORE INTO {TABLE} VALUES (1)", "INSERT", TABLE),
        (f"REPLACE INTO {TABLE} VALUES (1)", "REPLACE", TABLE),
        (f'UPDATE "{TABLE}" SET a = %s', "UPDATE", TABLE),
        (f"DELETE FROM {TABLE} WHERE a IN (SELECT b FROM nowhere)", "DELETE", TABLE),
        (f"WITH x AS (SELECT * FROM nowhere), y AS (DELETE FROM z) UPDATE {TABLE} SET a = 1", "UPDATE", TABLE),
        (f"WITH x AS (SELECT 1) SELECT * FROM {TABLE}", "SELECT", TABLE),
        (f"COPY {TABLE} (a) FROM STDIN", "COPY", TABLE),
        (f"CREATE INDEX i ON {TABLE} (a)", "CREATE", TABLE),
        (f"EXPLAIN SELECT * FROM {TABLE}", "EXPLAIN", TABLE),
        ("TRUNCATE nowhere", "TRUNCATE", ""),
        ('SAVEPOINT "s1"', "SAVEPOINT", ""),
        ("SET x = 1", "SET", ""),
        ("SELECT id FROM identity_user_groups", "SELECT", "identity_user_groups"),  # many to many
        ("SELECT app FROM django_migrations", "SELECT", "django_migrations"),
        ("FROBNICATE x", "other", "other"),
        ("", "other", "other"),
        ("WITH", "other", "other"),
        ("SELECT ' FROM unclosed", "SELECT", "other"),
        ("SELECT x FROM", "SELECT", ""),
        (")))", "other", "other"),
    ],
)
def test_what_a_statement_does_to_which_table(statement, operation, table):
    assert parsed(statement) == (operation, table)


class Counting:
    """How many queries were seen since."""

    def __init__(self, name="db_query_duration_seconds_count", **labels):
        self._name, self._labels = name, labels
        self._before = counted(name, **labels)

    def __int__(self):
        return int(counted(self._name, **self._labels) - self._before)


def errors(**labels):
    return Counting("db_query_errors_total", **labels)


def execute(statement, params=None):
    with connection.cursor() as cursor:
        cursor.execute(statement, params)


@pytest.mark.django_db
def test_each_query_is_counted_once_by_operation_and_table():
    seen = {
        verb: Counting(operation=verb, table=TABLE, service="voicehelper") for verb in ("SELECT", "INSERT", "DELETE")
    }
    failed, of_all = errors(), Counting()
    ContentType.objects.create(app_label="a", model="b")
    assert list(ContentType.objects.filter(app_label="a"))
    ContentType.objects.filter(app_label="a")._raw_delete(connection.alias)
    assert {verb: int(count) for verb, count in seen.items()} == {"SELECT": 1, "INSERT": 1, "DELETE": 1}
    assert (int(of_all), int(failed)) == (3, 0)


@pytest.mark.django_db
def test_a_failed_query_is_counted_as_both():
    queries, failed = Counting(table=TABLE), errors(table=TABLE, operation="INSERT")
    ContentType.objects.create(app_label="a", model="b")
    with pytest.raises(IntegrityError), transaction.atomic():
        ContentType.objects.create(app_label="a", model="b")
    assert (int(queries), int(failed)) == (2, 1)


@pytest.mark.django_db
def test_many_at_once_savepoints_and_what_the_driver_composes():
    inserts, savepoints = Counting(operation="INSERT", table=TABLE), Counting(operation="SAVEPOINT", table="")
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.executemany(f"INSERT INTO {TABLE} (app_label, model) VALUES (%s, %s)", [("a", "b"), ("c", "d")])
        cursor.execute(sql.SQL("INSERT INTO {} (app_label, model) VALUES ('e', 'f')").format(sql.Identifier(TABLE)))
        cursor.execute(f"INSERT INTO {TABLE} (app_label, model) VALUES ('g', 'h')".encode())
    assert (int(inserts), int(savepoints)) == (3, 1)


@pytest.mark.django_db(transaction=True)
def test_a_server_side_cursor_is_one_query_and_a_copy_is_seen_where_it_says_so():
    selects, copies, failed = (
        Counting(operation="SELECT", table=TABLE),
        Counting(operation="COPY"),
        errors(operation="COPY"),
    )
    assert list(ContentType.objects.iterator(chunk_size=2))
    with pytest.raises(ZeroDivisionError), timed(connection, f"COPY {TABLE} FROM STDIN"):
        raise ZeroDivisionError
    with timed(connection, f"COPY {TABLE} FROM STDIN"):
        pass
    assert (int(selects), int(copies), int(failed)) == (1, 2, 1)


@pytest.mark.django_db(transaction=True)
def test_once_in_every_thread_in_async_code_and_after_a_reconnect():
    def query():
        before = Counting(operation="SELECT", table=TABLE)
        ContentType.objects.exists()
        connection.close()
        ContentType.objects.exists()
        connection.close()
        return int(before), connection.execute_wrappers.count(observe_query)

    database.install()  # installing twice is once
    seen = [query()]
    thread = threading.Thread(target=lambda: seen.append(query()))
    thread.start()
    thread.join()

    async def from_async():
        seen.append(await sync_to_async(query)())

    async_to_sync(from_async)()
    assert seen == [(2, 1)] * 3


@pytest.mark.django_db(transaction=True)
def test_the_wrappers_of_others_come_and_go_undisturbed():
    def work():
        calls = []

        def other(execute, *arguments):
            calls.append(arguments[0])
            return execute(*arguments)

        with connection.execute_wrapper(other):  # before this thread has connected
            execute("SELECT 1")
        execute("SELECT 2")
        seen.append((calls, connection.execute_wrappers))
        connection.close()

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(["SELECT 1"], [observe_query])]


@pytest.mark.django_db
def test_odd_statements_make_few_series():
    execute("SELECT 1")
    before = {
        frozenset(s.labels.items()) for m in REGISTRY.collect() for s in m.samples if s.name.startswith("db_query")
    }
    known = {"", "other", *database._known_tables().values()}
    for number in range(10_000):
        for statement in (f"SELECT * FROM table_{number}", f"VERB{number} x", f"UPDATE t{number} SET a = {number}"):
            operation, table = parsed(statement)
            assert operation in ("SELECT", "UPDATE", "other") and table in known
    assert parsed.cache_info().currsize <= 1_000
    with pytest.raises(DatabaseError), transaction.atomic():
        execute("FROBNICATE " + "x" * 100_000)
    after = {
        frozenset(s.labels.items()) for m in REGISTRY.collect() for s in m.samples if s.name.startswith("db_query")
    }
    assert {dict(labels)["table"] for labels in after - before} <= {"other", ""}


@pytest.mark.django_db
def test_a_query_that_cannot_be_recorded_is_run_all_the_same(monkeypatch, caplog):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(database, "_series", full)
    assert ContentType.objects.exists()
    assert [record.getMessage() for record in caplog.records] == ["a query could not be recorded"]


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    exporter.tracer = provider.get_tracer("test")
    monkeypatch.setattr(database, "_tracer", exporter.tracer)
    return exporter


@pytest.mark.django_db
def test_a_query_is_a_span_of_its_trace(spans):
    with spans.tracer.start_as_current_span("request") as request:
        assert ContentType.objects.filter(app_label="secret").count() == 0
        with connection.cursor() as cursor:
            cursor.executemany(f"UPDATE {TABLE} SET model = %s WHERE id < 0", [("secret1",), ("secret2",)])
            cursor.execute("SELECT 1")
    select, update, nothing, _ = spans.get_finished_spans()
    assert (select.name, select.kind, select.parent.span_id) == (
        f"SELECT {TABLE}",
        SpanKind.CLIENT,
        request.get_span_context().span_id,
    )
    assert (
        dict(select.attributes).items()
        >= {
            "db.system.name": "postgresql",
            "db.namespace": connection.settings_dict["NAME"],
            "db.operation.name": "SELECT",
            "db.collection.name": TABLE,
            "db.query.summary": f"SELECT {TABLE}",
        }.items()
    )
    assert 0 < select.end_time - select.start_time < 5_000_000_000
    assert update.attributes["db.operation.batch.size"] == 2
    assert nothing.name == "SELECT" and "db.collection.name" not in nothing.attributes
    assert "secret" not in str([span.to_json() for span in spans.get_finished_spans()])


@pytest.mark.django_db
def test_a_failed_query_is_a_failed_span_without_the_row(spans):
    ContentType.objects.create(app_label="secret", model="b")
    with spans.tracer.start_as_current_span("request"), pytest.raises(IntegrityError), transaction.atomic():
        ContentType.objects.create(app_label="secret", model="b")
    [insert] = [span for span in spans.get_finished_spans() if span.name == f"INSERT {TABLE}"]
    assert (insert.status.status_code, insert.status.description) == (StatusCode.ERROR, "IntegrityError")
    assert insert.attributes["db.response.status_code"] == "23505"
    assert insert.attributes["error.type"] == "django.db.utils.IntegrityError"
    assert "secret" not in insert.to_json()


@pytest.mark.django_db
def test_no_trace_begins_with_a_query(spans):
    assert ContentType.objects.exists() is not None
    with pytest.raises(DatabaseError), transaction.atomic():
        execute("SELECT nonsense")
    assert spans.get_finished_spans() == ()
