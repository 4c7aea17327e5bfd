"""Which environment variables the code reads: what documents and containers are held against."""

import re
from pathlib import Path

from voicehelper.assistant.conf import assistant_settings, llm_prices
from voicehelper.email_settings import email_settings
from voicehelper.identity.conf import tenant_requests_per_minute
from voicehelper.kafka_security import kafka_security
from voicehelper.knowledge.conf import knowledge_from

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("voicehelper", "events_outbox", "monitoring")
# A name given to what reads the environment: a mapping of it, or a function that is given one.
READ = re.compile(
    r'(?:environ(?:ment)?(?:\.get|\.setdefault)?[\[(]|environment, |\benv\.\w+\()\s*"([A-Z][A-Z0-9_]+)"'
    r'|"([A-Z][A-Z0-9_]+)" (?:not )?in os\.environ'
)
# There, also a name given to a function of the module's own.
SETTINGS = ("settings.py", "gunicorn.conf.py", "devstack/supervisor.py")
READ_BY_NAME = re.compile(r'\b_\w+\("([A-Z][A-Z0-9_]+)"')
# Those that put names together, and others beside them.
PARSERS = (
    assistant_settings,
    llm_prices,
    kafka_security,
    tenant_requests_per_minute,
    lambda environment: email_settings(environment, is_dev=True),
    lambda environment: knowledge_from(environment, milvus_uri="x.db"),
)
NOT_OURS = {"PATH", "HOME", "TERM", "JAVA_HOME", "NO_COLOR", "MAKELEVEL", "DJANGO_SETTINGS_MODULE"}
# The rest of OpenTelemetry's own: the docstring of monitoring/tracing.py has them all.
OPENTELEMETRYS = re.compile(r"OTEL_(BSP_|SDK_|SEMCONV_|RESOURCE_|PROPAGATORS|TRACES_EXPORTER)")


class Asked(dict):
    """An empty environment that notes what it is asked for."""

    def __init__(self):
        self.names = set()

    def get(self, name, default=None):
        self.names.add(name)
        return default


def variables():
    """All of them but OpenTelemetry's further ones, and those that are no settings of the product."""
    environment = Asked()
    for parse in PARSERS:
        parse(environment)
    source = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    read = {one or other for one, other in READ.findall(source)}
    read |= {name for file in SETTINGS for name in READ_BY_NAME.findall((ROOT / "voicehelper" / file).read_text())}
    return {name for name in read | environment.names if name not in NOT_OURS and not OPENTELEMETRYS.match(name)}
