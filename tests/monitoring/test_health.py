"""/health, /livez and /readyz."""

import json
import socket
import time
from contextlib import closing

import pytest
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from django.test import Client

from monitoring.health import Readiness

from .conftest import run_python


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
    readiness = Readiness()
    recorder.record_unapplied(*last)
    try:
        [reason] = readiness.reasons_against(20)
        assert "migrations are not applied" in reason
    finally:
        recorder.record_applied(*last)
    assert readiness.reasons_against(20) == []


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
