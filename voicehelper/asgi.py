"""The ASGI application, for any ASGI server: `voicehelper.asgi:application`."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "voicehelper.settings")
application = get_asgi_application()

from voicehelper.parsers import Utf8ASGIRequest  # noqa: E402  # it takes settings

application.request_class = Utf8ASGIRequest

# Imported once Django is set up. Under gunicorn its configuration does this, after the fork.
from monitoring.tracing import init_tracing, tracing_config  # noqa: E402

init_tracing(tracing_config())
