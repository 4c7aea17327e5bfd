"""The test kit as pytest fixtures: put `pytest_plugins = ["events_outbox.pytest_plugin"]` into your conftest.py.

They need pytest-django.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

# `events_outbox.testing` is imported on use: pytest loads this before Django is set up.
if TYPE_CHECKING:
    from .embedded_broker import EmbeddedBroker
    from .testing import CapturedEvents, Handled


@pytest.fixture
def captured_events(db: None) -> "CapturedEvents":
    """The events emitted since this fixture was set up: see `events_outbox.testing.CapturedEvents`."""
    from .testing import CapturedEvents

    return CapturedEvents()


@pytest.fixture
def handle_now(db: None) -> "Callable[..., Handled]":
    """`handle_now("billing")` has the consumer handle what was emitted: see `events_outbox.testing.handle_now`."""
    from .testing import handle_now

    return handle_now


@pytest.fixture
def embedded_kafka() -> "Iterator[EmbeddedBroker]":
    """A broker for this test; use it with `django_db(transaction=True)`: see `events_outbox.testing.embedded_kafka`."""
    from .testing import embedded_kafka

    with embedded_kafka() as broker:
        yield broker
