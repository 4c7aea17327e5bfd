"""The ASGI application: `any ASGI server, voicehelper.asgi:application`."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "voicehelper.settings")
application = get_asgi_application()
