"""The WSGI application: `gunicorn voicehelper.wsgi`."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "voicehelper.settings")
application = get_wsgi_application()

from voicehelper.parsers import Utf8WSGIRequest  # noqa: E402  # it takes settings

application.request_class = Utf8WSGIRequest
