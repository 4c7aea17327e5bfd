"""Readiness: can this process serve requests, or handle events, now?"""

import logging
import threading
import time
import traceback
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from django.apps import apps
from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections, router, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.migrations.executor import MigrationExecutor

from monitoring.conf import monitoring_settings

logger = logging.getLogger(__name__)

READINESS_TIMEOUT_SECONDS = 2.0
FRESH_SECONDS = 1.0
"""For so long a good answer is given again: /readyz is open to everybody, and each look is a database connection."""
_QUICK_SECONDS = 0.25
_GIVEN_UP_AFTER_SECONDS = 10.0
_MOST_HANGING = 3


class Readiness:
    """Asks the databases, for a bounded time, whether they answer and have all migrations.

    All of `settings.DATABASES`, or those that `MONITORING["READY_DATABASES"]` names. Migrations are looked at where a
    router lets models migrate; not in a replica (`TEST: MIRROR`), which has its own from another one of them.

    Kafka is not asked: the outbox is there so that requests can be served without it.
    """

    def __init__(self, *, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._fresh_seconds = fresh_seconds
        self._lock = threading.Lock()
        self._databases: dict[str, _Database] = {}

    def reasons_against(self, timeout_seconds: float = READINESS_TIMEOUT_SECONDS) -> list[str]:
        """Return why requests cannot be served now; empty when they can.

        A database that has kept one waiting is not waited for so long again: until it has answered, each probe gets
        what was found last, nearly at once.
        """
        with self._lock:
            databases = [self._databases.setdefault(alias, _Database(alias)) for alias in _aliases()]
            looks = [database.look(self._fresh_seconds) for database in databases]
        return [reason for look in looks for reason in look.reasons(timeout_seconds)]


def _aliases() -> list[str]:
    aliases = monitoring_settings().ready_databases or list(settings.DATABASES) or [DEFAULT_DB_ALIAS]
    return [alias for alias in aliases if _setting(alias, "ENGINE") != "django.db.backends.dummy"]  # of none at all


def _setting(alias: str, name: str) -> Any:
    return connections.settings.get(alias, {}).get(name)


class _Database:
    """One database, looked at by one thread at a time, whatever the number of probes."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.name = "the database" if len(settings.DATABASES) < 2 else f"the database {alias!r}"
        self.is_migrated = False
        self._look: _Look | None = None
        self._hanging: list[_Look] = []

    def look(self, fresh_seconds: float) -> "_Look":
        """Return the look under way, or the last one while it is good news and fresh, else start one."""
        self._hanging = [look for look in self._hanging if not look.result.done()]
        look, now = self._look, time.monotonic()
        bad_news: list[str] = []
        if look is not None:
            if not look.result.done():
                if now - look.started < _GIVEN_UP_AFTER_SECONDS or len(self._hanging) >= _MOST_HANGING:
                    return look
                # Its connection may be dead without knowing it, where a new one would be answered.
                self._hanging.append(look)
                bad_news = [f"{self.name} does not answer"]
            elif not look.result.result():
                if now - look.ended < fresh_seconds:
                    return look
            elif look.ended - look.started > _QUICK_SECONDS:
                bad_news = look.result.result()
        self._look = _Look(self, bad_news)
        return self._look


class _Look:
    """One look at a database, in a thread and over a connection of its own."""

    def __init__(self, database: _Database, bad_news: list[str]) -> None:
        """`bad_news`: what the look before found, if that took its time."""
        self._database = database
        self._bad_news = bad_news
        self._is_told = False
        self.started = self.ended = time.monotonic()
        self.result: Future[list[str]] = Future()
        threading.Thread(target=self._run, name=f"readiness-{database.alias}", daemon=True).start()

    def reasons(self, timeout_seconds: float) -> list[str]:
        patience = min(timeout_seconds, _QUICK_SECONDS) if self._bad_news else timeout_seconds
        try:
            return self.result.result(max(0.0, self.started + patience - time.monotonic()))
        except TimeoutError:
            if self._bad_news:
                return self._bad_news
            reason = f"{self._database.name} did not answer within {timeout_seconds} s"
            if not self._is_told:
                self._is_told = True
                logger.warning("not ready: %s", reason)
            return [reason]

    def _run(self) -> None:
        reasons = []
        connection = None
        try:
            connection = _own_connection(self._database.alias)
            connections[self._database.alias] = connection  # of this thread, which ends here
            reasons = self._look(connection)
        except Exception as error:
            logger.warning("not ready: %s", error)
            # The answer is public: the type of the error, not its text, which names hosts and users.
            reasons = [f"{self._database.name} does not answer ({type(error).__name__})"]
            _let_go(error)
        finally:
            if connection is not None:
                with suppress(Exception):
                    connection.close()
            self.ended = time.monotonic()
            self.result.set_result(reasons)

    def _look(self, connection: BaseDatabaseWrapper) -> list[str]:
        database = self._database
        with transaction.atomic(database.alias), connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                # For this transaction: a lock on the table of migrations would keep the session waiting.
                milliseconds = str(int(_GIVEN_UP_AFTER_SECONDS * 500))
                cursor.execute("SELECT set_config('statement_timeout', %s, true)", [milliseconds])
            else:
                cursor.execute("SELECT 1" + connection.features.bare_select_suffix)
            if not database.is_migrated:  # looked at until they are applied: it reads every migration file
                if missing := _missing_migrations(connection):
                    return [f"{missing} migrations are not applied to {database.name}"]
                database.is_migrated = True
        return []


def _let_go(error: BaseException | None) -> None:
    """Free what the error's frames hold. A connection that timed out while it was made is closed when it is freed,
    and by themselves errors that refer to each other wait for a garbage collection: sessions would pile up until then.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _own_connection(alias: str) -> BaseDatabaseWrapper:
    """A connection with time limits, not out of the pool that the requests use up."""
    given = connections[alias]
    own = dict(given.settings_dict)
    if given.vendor == "postgresql":
        options = {name: value for name, value in own["OPTIONS"].items() if name != "pool"}
        limits = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 5000}
        own["OPTIONS"] = {**limits, **options, "connect_timeout": int(READINESS_TIMEOUT_SECONDS)}
    return type(given)(own, alias)


def _missing_migrations(connection: BaseDatabaseWrapper) -> int:
    if (_setting(connection.alias, "TEST") or {}).get("MIRROR"):
        return 0
    if not any(router.get_migratable_models(app, connection.alias) for app in apps.get_app_configs()):
        return 0
    executor = MigrationExecutor(connection)
    return len(executor.migration_plan(executor.loader.graph.leaf_nodes()))


readiness = Readiness()
