"""The product's settings and this app, for processes that tests start."""

import os

from voicehelper.settings import *  # noqa: F403
from voicehelper.settings import EVENTS_OUTBOX, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.events_outbox.consuming.apps.ConsumingConfig"]
EVENTS_OUTBOX = {**EVENTS_OUTBOX, "TOPIC_PARTITIONS": int(os.environ.get("TEST_PARTITIONS", "6"))}
