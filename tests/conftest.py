"""Fixtures for all tests. What they use is started by `tests/services.py`."""

from collections.abc import Iterator

import pytest

from tests.services import SERVICES, Kafka


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Kafka:
    """The running broker, with the four topics of six partitions: see `tests.services.Kafka`.

    A test may stop, kill or pause it: it is brought back afterwards.
    """
    broker = request.config.stash[SERVICES].kafka
    broker.start()
    return broker


@pytest.fixture(autouse=True)
def kafka_comes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    broker = request.config.stash[SERVICES].kafka
    if broker.was_started:
        broker.resume()
        if not broker.is_running():
            broker.start()
