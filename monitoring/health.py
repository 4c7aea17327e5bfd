"""Readiness: can this process serve requests now?"""

import logging
import threading
from concurrent.futures import Future

from django.db import connection
from django.db.migrations.executor import MigrationExecutor

logger = logging.getLogger(__name__)

READINESS_TIMEOUT_SECONDS = 2.0


class Readiness:
    """Asks the database, for a bounded time, whether it answers and has all migrations.

    Kafka is not asked: the outbox is there so that requests can be served without it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Future[list[str]] | None = None
        self._migrated = False

    def reasons_against(self, timeout_seconds: float = READINESS_TIMEOUT_SECONDS) -> list[str]:
        """Return why requests cannot be served now; empty when they can."""
        with self._lock:
            # Probes share the check under way: a database that hangs costs one thread, not one a probe.
            if self._running is None or self._running.done():
                self._running = Future()
                threading.Thread(target=self._check, args=(self._running,), daemon=True).start()
            running = self._running
        try:
            return running.result(timeout_seconds)
        except TimeoutError:
            return [f"the database did not answer within {timeout_seconds} s"]

    def _check(self, result: Future[list[str]]) -> None:
        try:
            reasons = self._database_reasons()
        except Exception as error:
            logger.warning("not ready: %s", error)
            # The answer is public: the type of the error, not its text, which names hosts and users.
            reasons = [f"the database does not answer ({type(error).__name__})"]
        finally:
            connection.close()  # of this thread, which ends here
        result.set_result(reasons)

    def _database_reasons(self) -> list[str]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        if not self._migrated:  # looked at until they are applied: it reads every migration file
            executor = MigrationExecutor(connection)
            missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
            if missing:
                return [f"{len(missing)} migrations are not applied"]
            self._migrated = True
        return []


readiness = Readiness()
