"""How many of the conversations that ended lately did what they were opened for, as a metric."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from django.db import connection, transaction
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from monitoring.metrics import CONVERSATION_SUCCESS_RATE

WINDOW = timedelta(hours=24)
MAX_TENANTS = 200
"""The tenants with the most conversations that ended have series; all of them would be too many."""
SCRAPE_SECONDS = 2
"""How long a scrape waits for the database."""

SUCCESS_RATES = """
WITH ended AS (
    SELECT tenant_id, mode, count(*) FILTER (WHERE status = 'completed') AS completed, count(*) AS ended
      FROM conversations_conversation
     WHERE ended_at > %s
     GROUP BY tenant_id, mode
), largest AS (
    SELECT tenant_id FROM ended GROUP BY tenant_id ORDER BY sum(ended) DESC, tenant_id LIMIT %s
)
SELECT mode, tenant_id, completed::float / ended FROM ended JOIN largest USING (tenant_id) ORDER BY tenant_id, mode
"""


class SuccessRateCollector(Collector):
    """The specification's conversation_success_rate: completed of all that ended in the last 24 hours.

    A tenant none of whose conversations in a mode has ended has no series for it: it has no rate. Raises what the
    database raises, also when it takes longer than SCRAPE_SECONDS.
    """

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = CONVERSATION_SUCCESS_RATE()
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [f"{SCRAPE_SECONDS}s"])
            cursor.execute(SUCCESS_RATES, [datetime.now(UTC) - WINDOW, MAX_TENANTS])
            for mode, tenant_id, rate in cursor.fetchall():
                family.add_metric([mode, str(tenant_id)], rate)
        yield family
