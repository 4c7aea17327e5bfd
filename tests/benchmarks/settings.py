"""The product's settings with the bench's own event handlers, for `manage.py consume` of a bench run."""

from voicehelper.settings import *  # noqa: F403
from voicehelper.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.benchmarks"]
