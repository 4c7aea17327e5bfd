"""Fixtures for all tests. What they use is started by `tests/services.py`."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

from tests.secure_kafka import SecureKafka
from tests.services import SERVICES, Kafka
from tests.topics import TopicReader


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> None:
    """The tables of the audit log can be emptied after a test, as all others: see its migration 0004."""
    with django_db_blocker.unblock():
        let_audit_log_be_truncated()


def let_audit_log_be_truncated() -> None:
    with connection.cursor() as cursor:
        for table in ("audit_auditentry", "audit_auditchain"):
            cursor.execute(f"ALTER TABLE {table} DISABLE TRIGGER audit_is_not_truncated")


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Kafka:
    """The running broker, with the four topics of six partitions: see `tests.services.Kafka`.

    A test may stop, kill or pause it: it is brought back afterwards.
    """
    broker = request.config.stash[SERVICES].kafka
    broker.start()
    return broker


@pytest.fixture(scope="session")
def secure_kafka(request: pytest.FixtureRequest) -> Iterator[SecureKafka]:
    """A second broker with TLS, SASL and ACLs, started by the first test that asks: see `tests.secure_kafka`.

    Needs Apache Kafka and openssl; mark the test so. Each test makes its own users, and topics where it changes them.
    """
    services = request.config.stash[SERVICES]
    broker = SecureKafka(services.data_dir / "secure-kafka", services.log.fileno())
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


@pytest.fixture(autouse=True)
def kafka_comes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    broker = request.config.stash[SERVICES].kafka
    if broker.was_started:
        broker.resume()
        if not broker.is_running():
            broker.start()


@pytest.fixture
def topic_reader(kafka: Kafka) -> Iterator[TopicReader]:
    """Reads what comes into the topics from now on."""
    reader = TopicReader(kafka.bootstrap_servers)
    yield reader
    reader.close()
