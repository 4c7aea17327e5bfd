"""/health, /livez and /readyz: also of databases that hang, and of several."""

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psutil
import psycopg
import pytest
from django.db import connection, connections
from django.db.migrations.recorder import MigrationRecorder
from django.test import Client

from monitoring import health
from monitoring.health import Readiness
from voicehelper.devstack.postgres import FORGETFUL, EmbeddedPostgres

from .conftest import ROOT, answers, free_port, get, project_environment, run_python, running_gunicorn, wait_until


@pytest.mark.parametrize(("path", "status"), [("/health", "healthy"), ("/livez", "alive")])
def test_needs_no_database(path, status):
    # No django_db mark: a query would fail this test.
    response = Client().get(path)
    assert (response.status_code, response.json()) == (200, {"status": status})
    assert response.cookies == {}


@pytest.mark.django_db
def test_ready():
    response = Client().get("/readyz")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


@pytest.mark.django_db(transaction=True)
def test_not_ready_until_migrations_are_applied():
    recorder = MigrationRecorder(connection)
    last = ("contenttypes", "0002_remove_content_type_name")
    readiness = Readiness(fresh_seconds=60)
    recorder.record_unapplied(*last)
    try:
        [reason] = readiness.reasons_against(20)
        assert "migrations are not applied" in reason
    finally:
        recorder.record_applied(*last)
    wait_until(lambda: readiness.reasons_against(20) == [])
    recorder.record_unapplied(*last)
    assert readiness.reasons_against(20) == []  # good news, and fresh
    recorder.record_applied(*last)


ASK = """
import django, json, time
django.setup()
from django.test import Client
started = time.monotonic()
response = Client().get("/readyz")
print(json.dumps([response.status_code, response.json(), time.monotonic() - started]))
"""


def test_database_that_refuses_is_a_reason_without_details():
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        done = run_python(ASK, PROJECT_DATABASE_URL=f"postgresql://someone:secret@127.0.0.1:{port}/none")
    status, answer, _ = json.loads(done.stdout)
    assert status == 503
    assert answer == {"status": "unready", "reasons": ["the database does not answer (OperationalError)"]}
    assert "not ready" in done.stderr
    assert "secret" not in done.stderr


def test_database_that_hangs_does_not_hang_the_answer():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        done = run_python(ASK, PROJECT_DATABASE_URL=f"postgresql://someone@127.0.0.1:{port}/none")
    status, answer, seconds = json.loads(done.stdout)
    assert (status, answer["reasons"]) == (503, ["the database did not answer within 2.0 s"])
    assert 2 <= seconds < 4
    assert time.monotonic() - started < 20  # nor the end of the process


def test_no_database_at_all_is_ready(settings, monkeypatch):
    monkeypatch.setitem(connections.settings["default"], "ENGINE", "django.db.backends.dummy")
    assert Readiness().reasons_against(1) == []


class ReplicaRouter:
    def allow_migrate(self, db, app_label, **hints):
        return False if db == "archive" else None


TWO_DATABASES = """
import json
from django.conf import settings
from tests.monitoring.project import settings as project
project.DATABASES = json.loads({databases!r})
project.DATABASE_ROUTERS = {routers!r}
project.MONITORING |= json.loads({monitoring!r})
import django; django.setup()
from django.core.management import call_command
for alias in {migrate!r}: call_command("migrate", database=alias, verbosity=0)
from monitoring.health import readiness
print(json.dumps(readiness.reasons_against(10)))
"""


def reasons_of(databases, *, routers=(), migrate=(), **monitoring):
    code = TWO_DATABASES.format(
        databases=json.dumps(databases), routers=list(routers), monitoring=json.dumps(monitoring), migrate=list(migrate)
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_of_several_databases_is_asked(tmp_path):
    def sqlite(name, **more):
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / name), **more}

    away = {"ENGINE": "django.db.backends.postgresql", "HOST": "127.0.0.1", "PORT": free_port(), "NAME": "x"}
    not_migrated = "2 migrations are not applied to the database 'archive'"
    both = {"default": sqlite("one"), "archive": sqlite("two")}
    assert reasons_of(both, migrate=["default"]) == [not_migrated]
    assert reasons_of(both, migrate=["default", "archive"]) == []
    (tmp_path / "two").unlink()
    # One that is no place for migrations; a replica; one that is nobody's business.
    assert reasons_of(both, routers=["tests.monitoring.test_health.ReplicaRouter"]) == []
    assert reasons_of({"default": both["default"], "archive": sqlite("two", TEST={"MIRROR": "default"})}) == []
    assert reasons_of(both, READY_DATABASES=["default"]) == []
    assert reasons_of({"default": both["default"], "away": away}) == [
        "the database 'away' does not answer (OperationalError)"
    ]
    assert reasons_of({"default": both["default"], "away": away}, READY_DATABASES=["default"]) == []


# -- with a PostgreSQL of our own, which may be frozen --


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    directory = tmp_path_factory.mktemp("postgres")
    with (directory / "log").open("wb") as log:
        server = EmbeddedPostgres(directory / "data", output=log.fileno(), settings=FORGETFUL)
        server.start()
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


@contextmanager
def frozen(server):
    server.pause()
    try:
        yield
    finally:
        server.resume()


def sessions(server):
    with closing(psycopg.connect(server.url, autocommit=True)) as admin:
        return admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid != pg_backend_pid()"
        ).fetchone()[0]


WORK = """
import django, gc, sys, time
django.setup()
gc.disable()  # an idle process collects no garbage for hours: what is let go must be free at once
from monitoring.worker import Worker
with Worker("relay", int(sys.argv[1])) as worker:
    while True:
        worker.tick()
        time.sleep(0.05)
"""


@contextmanager
def running_worker(directory, **environment):
    """(URL, pid) of a worker process."""
    port = free_port()
    with (
        (directory / "worker-log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(port)], env=project_environment(**environment), cwd=ROOT, stdout=log
        ) as process,
    ):
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/livez"))
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


@contextmanager
def running_web(directory, **environment):
    with running_gunicorn(directory, WEB_CONCURRENCY="1", WEB_THREADS="8", **environment) as server:
        yield server.url, int(get(f"{server.url}/pid").text)


def probe(url, count):
    """Statuses, reasons and the longest time, of so many probes from 25 threads."""

    def one(_):
        started = time.monotonic()
        answer = get(f"{url}/readyz")
        return answer.status, tuple(answer.json().get("reasons", ())), time.monotonic() - started

    with ThreadPoolExecutor(25) as pool:
        statuses, reasons, seconds = zip(*pool.map(one, range(count)), strict=True)
    return set(statuses), set(reasons), max(seconds)


@contextmanager
def sampled(count):
    """Numbers that `count()` gives all along."""
    numbers, is_over = [count()], threading.Event()

    def sample():
        while not is_over.wait(0.02):
            numbers.append(count())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield numbers
    finally:
        is_over.set()
        thread.join()


DID_NOT_ANSWER = "the database did not answer within 2.0 s"
GAVE_UP = "the database does not answer (OperationalError)"


@pytest.mark.parametrize("running", [running_web, running_worker])
def test_hundred_probes_while_the_database_is_frozen(running, postgres, tmp_path):
    with closing(psycopg.connect(postgres.url, autocommit=True)) as admin:  # whatever another test has left
        admin.execute("DROP SCHEMA public CASCADE")
        admin.execute("CREATE SCHEMA public")
    migrated = run_python(
        "import django; django.setup(); from django.core.management import call_command; call_command('migrate')",
        PROJECT_DATABASE_URL=postgres.url,
    )
    assert migrated.returncode == 0, migrated.stderr
    log = tmp_path / ("worker-log" if running is running_worker else "stdout")
    with running(tmp_path, PROJECT_DATABASE_URL=postgres.url) as (url, pid):
        wait_until(lambda: get(f"{url}/readyz").status == 200)
        process = psutil.Process(pid)
        threads = process.num_threads()
        probe(url, 100)  # the pool of the web server's threads is full now
        threads = max(threads, process.num_threads())
        wait_until(lambda: sessions(postgres) == 0)
        with frozen(postgres):
            wait_until(lambda: get(f"{url}/readyz").status == 503)  # no longer fresh
            with sampled(lambda: len(process.net_connections("unix"))) as sockets:
                statuses, reasons, seconds = probe(url, 100)
            assert max(sockets) - min(sockets) <= 2  # the one look's, and that of one that has just ended
            assert statuses == {503}
            assert reasons <= {(DID_NOT_ANSWER,), (GAVE_UP,)}
            assert seconds < 10
            for path in ("/livez", "/health"):
                assert get(f"{url}{path}").status == 200
            wait_until(lambda: process.num_threads() <= threads + 1)  # that of the one look
            wait_until(lambda: get(f"{url}/readyz") and log.read_text().count("timeout expired") > 1)
        wait_until(lambda: get(f"{url}/readyz").status == 200)
        wait_until(lambda: sessions(postgres) == 0)


def test_lock_on_the_table_of_migrations(postgres, tmp_path):
    with closing(psycopg.connect(postgres.url)) as locker:
        locker.execute("DROP TABLE IF EXISTS django_migrations")
        locker.execute("CREATE TABLE django_migrations (id int, app text, name text, applied timestamptz)")
        locker.commit()
        locker.execute("LOCK TABLE django_migrations IN ACCESS EXCLUSIVE MODE")
        with running_worker(tmp_path, PROJECT_DATABASE_URL=postgres.url) as (url, _):
            statuses, reasons, seconds = probe(url, 50)
            assert (statuses, reasons) == ({503}, {(DID_NOT_ANSWER,)})
            assert seconds < 10
            assert sessions(postgres) == 2  # the locker's, and that of the one look
            # The server ends what waits too long, so that sessions do not pile up there either.
            wait_until(lambda: "statement timeout" in (tmp_path / "worker-log").read_text())
            get(f"{url}/readyz")
            assert sessions(postgres) == 2
            locker.rollback()
            wait_until(lambda: "migrations are not applied" in get(f"{url}/readyz").text)


def test_look_that_hangs_for_ever_is_given_up(monkeypatch):
    """As over a connection whose other end is gone without a word: a new one would be answered."""
    monkeypatch.setattr(health, "_GIVEN_UP_AFTER_SECONDS", 0.2)
    going_on, looks = threading.Event(), []

    def look(self, connection):
        looks.append(self)
        if len(looks) < hanging:
            going_on.wait(20)
        return []

    monkeypatch.setattr(health._Look, "_look", look)
    hanging = 2
    readiness = Readiness()
    assert readiness.reasons_against(0.05) == [DID_NOT_ANSWER.replace("2.0", "0.05")]
    wait_until(lambda: readiness.reasons_against(0.05) == [])
    assert len(looks) == 2
    # Not without end.
    hanging, readiness = 100, Readiness()
    looks.clear()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert readiness.reasons_against(0.02)
    assert len(looks) == 1 + health._MOST_HANGING
    going_on.set()
    wait_until(lambda: all(look.result.done() for look in looks))
