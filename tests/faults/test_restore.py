"""A real dump, restored into a new cluster: nothing is lost, nothing that was published is published again."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import psycopg
import pytest

from events_outbox.proto.base_event_pb2 import BaseEvent
from tests.topics import TopicReader
from voicehelper.devstack.postgres import FORGETFUL, EmbeddedPostgres, _binaries

ROOT = Path(__file__).resolve().parents[2]
AGGREGATES = 7

EMIT = """
import sys
from django.db import transaction
from events_outbox import NewEvent, emit_events
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

start, end = map(int, sys.argv[1:])
for first in range(start, end, 10):
    with transaction.atomic():
        emit_events(
            NewEvent(event_type="conversation.created", payload=ConversationCreatedPayload(), tenant_id="t",
                     aggregate_id=f"{n % 7}", metadata={"number": str(n)})
            for n in range(first, min(first + 10, end))
        )
"""
PUBLISH_HALF_A_WINDOW = """
from events_outbox.leader import Leader, open_session
from events_outbox.models import RelayCursor
from events_outbox.publisher import Publisher
from events_outbox.relay import Relay

with open_session() as session:
    leader = Leader(session)
    assert leader.try_lead()
    relay = Relay(batch_size=60)
    relay.stop()
    publisher = Publisher(lambda what_for: None)
    assert relay.publish_window(leader, publisher) == 60
    publisher.close()
assert RelayCursor.read().window is not None
"""


class Cluster:
    def __init__(self, directory, output):
        self.server = EmbeddedPostgres(directory, output=output, settings=FORGETFUL)
        self.server.start()
        self.server.wait_until_ready()
        self.environment = {
            **os.environ,
            "DATABASE_URL": self.server.url,
            "DJANGO_SETTINGS_MODULE": "voicehelper.settings",
        }

    def _run(self, *command):
        result = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def manage(self, *arguments):
        return self._run("manage.py", *arguments)

    def script(self, text, *arguments):
        return self._run("-c", f"import django; django.setup()\n{text}", *arguments)

    def let_transaction_ids_pass(self, count):
        with psycopg.connect(self.server.url, autocommit=True) as session:
            session.execute(
                f"DO $$ BEGIN FOR i IN 1..{count} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
            )

    def program(self, name, *arguments):
        subprocess.run([_binaries() / name, *arguments, self.server.url], check=True, timeout=120)


@pytest.fixture
def clusters(kafka, tmp_path):
    made = []
    with (tmp_path / "postgres.log").open("wb") as log:

        def make(name):
            made.append(Cluster(tmp_path / name, log.fileno()))
            return made[-1]

        yield make
        for cluster in made:
            cluster.server.stop()


@pytest.mark.parametrize(
    ("which_is_ahead", "with_cursor"),
    [("old", True), ("new", True), pytest.param("old", False, marks=pytest.mark.apache_kafka)],
)
def test_a_dump_restored_into_a_new_cluster(clusters, kafka, tmp_path, which_is_ahead, with_cursor):
    reader = TopicReader(kafka.bootstrap_servers)
    old = clusters("old")
    if which_is_ahead == "old":
        old.let_transaction_ids_pass(20_000)
    old.manage("migrate", "-v0")
    old.script(EMIT, 0, 200)
    old.manage("relay_outbox", "--until-empty")  # published
    old.script(EMIT, 200, 320)
    old.script(PUBLISH_HALF_A_WINDOW)  # 60 of these 120
    old.script(EMIT, 320, 400)  # pending
    assert len(reader.read_rest()) == 260
    dump = tmp_path / "dump"
    without = [] if with_cursor else ["--exclude-table-data=events_outbox_relaycursor"]
    old.program("pg_dump", "--format=custom", f"--file={dump}", *without)

    new = clusters("new")
    if which_is_ahead == "new":
        new.let_transaction_ids_pass(20_000)
    subprocess.run(
        [_binaries() / "pg_restore", f"--dbname={new.server.url}", dump], check=True, timeout=120, capture_output=True
    )
    new.script(EMIT, 400, 450)  # before a relay first leads here
    new.manage("relay_outbox", "--until-empty")
    new.script(EMIT, 450, 500)
    new.manage("relay_outbox", "--until-empty")

    numbers = defaultdict(list)
    for message in reader.read_rest():
        numbers[message.key().decode()].append(int(BaseEvent.FromString(message.value()).metadata["number"]))
    reader.close()
    assert numbers == {str(key): list(range(key, 500, AGGREGATES)) for key in range(AGGREGATES)}
