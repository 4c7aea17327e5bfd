"""The WSGI application: `gunicorn voicehelper.wsgi`."""

import os
from typing import Any

from django.core.handlers.wsgi import WSGIRequest
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "voicehelper.settings")


class Request(WSGIRequest):
    """One whose Content-Type cannot be read, as of `charset*=none''x`, has none: Django would fail before any view."""

    def __init__(self, environ: dict[str, Any]) -> None:
        try:
            super().__init__(environ)
        except ValueError:
            super().__init__({**environ, "CONTENT_TYPE": ""})


application = get_wsgi_application()
application.request_class = Request
