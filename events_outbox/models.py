"""Tables of the outbox and of the consumers, and the questions asked of them as QuerySet verbs."""

from base64 import b64decode
from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID, uuid4

from django.db import connection, models
from django.db.models import Case, F, Func, Q, Value, When
from django.db.models.functions import MD5, Now

from .fields import PgSnapshot, PgSnapshotField, Xid8Field, nothing_seen

Key = tuple[str, bytes]
"""Topic and key of a record: what is handled in order."""


EventId = UUID | str


def visible_in(snapshot: PgSnapshot) -> Func:
    """The condition that a row's transaction had committed when `snapshot` was taken."""
    return Func(
        F("transaction_id"),
        Value(str(snapshot)),
        function="pg_visible_in_snapshot",
        output_field=models.BooleanField(),
    )


class RelayCursor(models.Model):
    """How far the relay has published: one row, moved only by the leader on the session that holds the lock."""

    id = models.PositiveSmallIntegerField(primary_key=True, default=1)
    published = PgSnapshotField(
        default=nothing_seen, help_text="Every event whose transaction this snapshot sees is published (or parked)."
    )
    window = PgSnapshotField(null=True, help_text="Snapshot of the window being published, if one is in progress.")
    window_last_id = models.BigIntegerField(default=0, help_text="Last event id of the window that is published.")
    system_identifier = models.BigIntegerField(
        null=True, help_text="The PostgreSQL cluster that the snapshots' transaction ids belong to."
    )
    leader = models.CharField(max_length=255, default="", help_text="host:pid of the relay that leads or led last.")
    leader_since = models.DateTimeField(null=True)
    heartbeat_at = models.DateTimeField(null=True, help_text="When the leader last said that it works.")
    last_error = models.TextField(default="", help_text="What the leader is waiting for; empty when all is well.")
    events_per_second = models.FloatField(default=0, help_text="Published over about the last ten seconds.")

    class Meta:
        verbose_name = verbose_name_plural = "relay cursor"
        permissions = [("pause_relay", "Can pause and resume the relay")]
        constraints = [models.CheckConstraint(condition=Q(id=1), name="relay_cursor_is_one_row")]

    def __str__(self) -> str:
        return f"published {self.published}"

    @classmethod
    def read(cls) -> "RelayCursor":
        """Return the cursor, or the one a first relay would start from. Writes nothing."""
        return cls.objects.filter(id=1).first() or cls()

    def is_of_this_cluster(self) -> bool:
        """Whether its snapshots speak of this cluster's transactions; not after a restore, until a relay has led."""
        with connection.cursor() as cursor:
            cursor.execute(
                """SELECT system_identifier, pg_snapshot_xmax(pg_current_snapshot())::text::bigint
                     FROM pg_control_system()"""
            )
            ((cluster, next_xid),) = cursor.fetchall()
        return self.system_identifier in (None, cluster) and self.published.xmax <= next_xid

    def has_published(self, event: "OutboxEvent") -> bool:
        """Whether the relay is past this event: it was published, or parked as undeliverable."""
        in_window = self.window is not None and self.window.sees(event.transaction_id)
        return self.published.sees(event.transaction_id) or (in_window and event.id <= self.window_last_id)


class OutboxEventQuerySet(models.QuerySet["OutboxEvent"]):
    def pending(self, cursor: RelayCursor) -> "OutboxEventQuerySet":
        """Committed events that the relay has not come to yet.

        The snapshot is taken apart into constants so that the index on (transaction_id, id) serves it.
        """
        lo = cursor.published
        pending = self.filter(transaction_id__gte=lo.xmin)  # else a scan can begin with the first published row
        pending = pending.filter(Q(transaction_id__gte=lo.xmax) | Q(transaction_id__in=sorted(lo.xip)))
        if cursor.window is not None:
            pending = pending.exclude(Q(visible_in(cursor.window)) & Q(id__lte=cursor.window_last_id))
        return pending

    def past(self, cursor: RelayCursor) -> "OutboxEventQuerySet":
        """Events that the relay has published or parked."""
        past = Q(visible_in(cursor.published))
        if cursor.window is not None:
            past |= Q(visible_in(cursor.window)) & Q(id__lte=cursor.window_last_id)
        return self.filter(past)


class OutboxEvent(models.Model):
    """An event, inserted in the transaction of the business write. Rows are never updated.

    Its status is derived from the relay's cursor: see `RelayCursor.has_published()`.
    """

    id = models.BigAutoField(primary_key=True)
    transaction_id = Xid8Field(editable=False, db_default=Func(function="pg_current_xact_id", output_field=Xid8Field()))
    event_id = models.UUIDField(unique=True)
    event_type = models.CharField(max_length=128)
    event_version = models.CharField(max_length=16)
    aggregate_id = models.CharField(max_length=255)
    tenant_id = models.CharField(max_length=255)
    topic = models.CharField(max_length=249)
    correlation_id = models.CharField(max_length=255)
    traceparent = models.CharField(max_length=55, default="")
    tracestate = models.CharField(max_length=512, default="")
    baggage = models.TextField(default="")
    created_at = models.DateTimeField(db_default=Now())
    value = models.BinaryField(help_text="The serialised BaseEvent: exactly the bytes of the Kafka record.")

    objects: ClassVar[Any] = OutboxEventQuerySet.as_manager()

    class Meta:
        verbose_name = "event"
        permissions = [
            ("view_payload", "Can read the payload of events"),
            ("replay_events", "Can replay events"),
            ("export_events", "Can export lists as CSV"),
        ]
        ordering = ["-id"]
        # Few, since every emit pays for each. Not `db_index`, which adds a second one for LIKE.
        indexes = [
            models.Index(fields=["transaction_id", "id"], name="outbox_window"),
            models.Index(fields=["aggregate_id"], name="outbox_aggregate"),
            models.Index(fields=["correlation_id"], name="outbox_correlation"),
        ]

    def __str__(self) -> str:
        return f"{self.event_type} {self.event_id}"


class UndeliverableEventQuerySet(models.QuerySet["UndeliverableEvent"]):
    def open(self) -> "UndeliverableEventQuerySet":
        """Parked events that nobody has discarded: they hold back the later ones of their key."""
        return self.filter(discarded_at__isnull=True)


class UndeliverableEvent(models.Model):
    """An event that the broker refused for good, or a later one of its key that waits behind it.

    `id` is the order in which the relay came to them, and so the order of a redrive.
    """

    event = models.OneToOneField(OutboxEvent, on_delete=models.PROTECT, related_name="undeliverable")
    topic = models.CharField(max_length=249)
    aggregate_id = models.CharField(max_length=255)
    reason = models.CharField(max_length=64, help_text='Kafka error name, or "behind" for a follower of the same key.')
    error = models.TextField()
    parked_at = models.DateTimeField(db_default=Now())
    redrive_requested_at = models.DateTimeField(null=True, help_text="Set by an operator; the leader redrives it.")
    discarded_at = models.DateTimeField(null=True, help_text="Given up by an operator: it holds back nothing any more.")
    discarded_by = models.CharField(max_length=150, default="", blank=True)
    discard_reason = models.TextField(default="", blank=True)

    objects: ClassVar[Any] = UndeliverableEventQuerySet.as_manager()

    class Meta:
        verbose_name = "undeliverable event"
        permissions = [
            ("redrive_undeliverableevent", "Can redrive undeliverable events"),
            ("discard_undeliverableevent", "Can discard undeliverable events"),
        ]
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["topic", "aggregate_id"], name="undeliverable_key"),
            # What the leader asks for every second, among what may be a million parked events.
            models.Index(fields=["id"], condition=Q(redrive_requested_at__isnull=False), name="undeliverable_redrive"),
            models.Index(fields=["id"], condition=Q(discarded_at__isnull=False), name="undeliverable_discarded"),
            models.Index(fields=["id"], condition=Q(discarded_at__isnull=True), name="undeliverable_open"),
        ]

    def __str__(self) -> str:
        return f"{self.event_id} {self.reason}"


class ProcessedEventQuerySet(models.QuerySet["ProcessedEvent"]):
    def mark(self, consumer: str, event_ids: Iterable[EventId]) -> set[str]:
        """Insert the marks in one statement and return the ids that had none yet, in their canonical text form.

        ON CONFLICT settles the race with another member of the group that handles the same event: it waits for that
        transaction and takes the id only if it rolled back.
        """
        with connection.cursor() as cursor:
            cursor.execute(
                """INSERT INTO events_outbox_processedevent (consumer, event_id)
                   SELECT %s, unnest(%s::uuid[]) ON CONFLICT DO NOTHING RETURNING event_id::text""",
                [consumer, _array(event_ids)],
            )
            return {row[0] for row in cursor.fetchall()}

    def marked(self, consumer: str, event_ids: Iterable[EventId]) -> set[str]:
        """Return those of the ids that have a mark: for many duplicates cheaper than trying to insert them."""
        with connection.cursor() as cursor:
            cursor.execute(
                """SELECT event_id::text FROM events_outbox_processedevent
                    WHERE consumer = %s AND event_id = ANY(%s::uuid[])""",
                [consumer, _array(event_ids)],
            )
            return {row[0] for row in cursor.fetchall()}

    def renew(self, consumer: str, event_id: UUID) -> bool:
        """Put a mark of now in the place of the old one, if there is one. False: somebody else has marked it just now.

        It goes to the end of the table, where the pruning by age expects it. Who inserts the mark meanwhile waits for
        this transaction.
        """
        self.filter(consumer=consumer, event_id=event_id).delete()
        return bool(self.mark(consumer, [str(event_id)]))


def _array(event_ids: Iterable[EventId]) -> str:
    """The ids as the text of one array: as a list it would take several times longer to pass them."""
    return f"{{{','.join(map(str, event_ids))}}}"


class ProcessedEvent(models.Model):
    """The mark that a consumer is done with an event, in the transaction of the handler's effects."""

    id = models.BigAutoField(primary_key=True)
    consumer = models.CharField(max_length=100)
    event_id = models.UUIDField()
    processed_at = models.DateTimeField(db_default=Now())

    objects: ClassVar[Any] = ProcessedEventQuerySet.as_manager()

    class Meta:
        verbose_name = "processed event"
        ordering = ["-id"]
        constraints = [models.UniqueConstraint(fields=["consumer", "event_id"], name="processed_once")]

    def __str__(self) -> str:
        return f"{self.consumer} {self.event_id}"


class DeadLetterQuerySet(models.QuerySet["DeadLetter"]):
    def open(self) -> "DeadLetterQuerySet":
        """Dead letters that nobody has replayed or discarded."""
        return self.filter(resolution="")

    def of_key(self, consumer: str, topic: str, key: bytes) -> "DeadLetterQuerySet":
        """Those of a consumer's events of one key, in order."""
        # By hash, which the index of the open ones has, and then by the key itself.
        hashed = MD5(Value(key, output_field=models.BinaryField()))
        letters = self.alias(key_hash=MD5("key")).filter(consumer=consumer, topic=topic, key_hash=hashed, key=key)
        return letters.order_by("id")

    def released(self, consumer: str) -> "DeadLetterQuerySet":
        """Open ones that waited behind others and are the first of their key now."""
        return self.open().filter(consumer=consumer, released_at__isnull=False).order_by("id")

    def parked(self, consumer: str, keys: Collection[Key]) -> set[Key]:
        """Of these keys, those with an open dead letter.

        One look into the index for each key, and one in all for a consumer without open letters. The lateral join and
        the order keep the planner from reading the table instead, the limit keeps it from reading all of a key.
        """
        wanted = sorted(keys)
        with connection.cursor() as cursor:
            cursor.execute(
                """SELECT wanted.topic, wanted.key FROM unnest(%(topics)s::text[], %(keys)s::bytea[]) wanted(topic, key)
                     CROSS JOIN LATERAL (
                           SELECT FROM events_outbox_deadletter letter
                            WHERE letter.resolution = '' AND letter.consumer = %(consumer)s
                              AND letter.topic = wanted.topic AND md5(letter.key) = md5(wanted.key)
                              AND letter.key = wanted.key
                            LIMIT 1) first_of_key
                     WHERE (SELECT id FROM events_outbox_deadletter WHERE resolution = '' AND consumer = %(consumer)s
                             ORDER BY topic, md5(key), id LIMIT 1) IS NOT NULL""",
                {"consumer": consumer, "topics": [topic for topic, _ in wanted], "keys": [key for _, key in wanted]},
            )
            return {(topic, bytes(key)) for topic, key in cursor.fetchall()}


class DeadLetter(models.Model):
    """A record that a consumer could not handle, kept whole so that it can be replayed."""

    class Reason(models.TextChoices):
        UNPARSABLE = "unparsable", "not a BaseEvent"
        UNKNOWN_TYPE = "unknown_type", "event type and version not in the catalog"
        PAYLOAD_MISMATCH = "payload_mismatch", "payload is not the catalog's message"
        PERMANENT = "permanent", "the handler said that retrying is useless"
        FAILED = "failed", "out of retries"
        BEHIND = "behind", "parked behind an earlier dead letter of its key"

    class Resolution(models.TextChoices):
        OPEN = "", "open"
        REPLAYED = "replayed", "replayed"
        DISCARDED = "discarded", "discarded"

    consumer = models.CharField(max_length=100)
    event_id = models.UUIDField(help_text="For a record that is no event: an id made from its place and bytes.")
    event_type = models.CharField(max_length=128, blank=True)
    tenant_id = models.CharField(max_length=255, blank=True)
    topic = models.CharField(max_length=249)
    partition = models.IntegerField()
    offset = models.BigIntegerField()
    key = models.BinaryField(null=True)
    value = models.BinaryField(null=True, help_text="The raw bytes of the record; null for a record without value.")
    headers = models.JSONField(default=list, help_text="Pairs of name and base64 of the value, in order.")
    reason = models.CharField(max_length=20, choices=Reason.choices)
    error = models.TextField()
    traceback = models.TextField(blank=True)
    attempts = models.PositiveIntegerField(default=0, help_text="How often the handler has failed on it in all.")
    replays = models.PositiveIntegerField(default=0, help_text="How often it was replayed in vain.")
    history = models.JSONField(
        default=list, help_text="Earlier failures, oldest first: at, by, reason, attempts, error, traceback."
    )
    created_at = models.DateTimeField(db_default=Now())
    failed_at = models.DateTimeField(db_default=Now(), help_text="When it failed last.")
    failed_by = models.CharField(
        max_length=150, default="consumer", help_text='Who ran it then: the operator of a replay, or "consumer".'
    )
    released_at = models.DateTimeField(
        null=True, blank=True, help_text="Since when nothing of its key is open before it: the consumer handles it."
    )
    resolution = models.CharField(max_length=10, choices=Resolution.choices, default="", blank=True)
    resolved_at = models.DateTimeField(null=True, blank=True)
    resolved_by = models.CharField(max_length=150, default="", blank=True)
    resolution_reason = models.TextField(default="", blank=True)

    objects: ClassVar[Any] = DeadLetterQuerySet.as_manager()

    class Meta:
        verbose_name = "dead letter"
        permissions = [
            ("replay_deadletter", "Can replay dead letters"),
            ("discard_deadletter", "Can discard dead letters"),
        ]
        ordering = ["-id"]
        constraints = [models.UniqueConstraint(fields=["consumer", "event_id"], name="dead_letter_once")]
        # By the key's hash: a key can be longer than an index entry may be.
        indexes = [
            models.Index("consumer", "topic", MD5("key"), "id", condition=Q(resolution=""), name="open_dead_letters"),
            # What the consumer asks for every other second, among what may be a million open ones.
            models.Index(
                fields=["consumer", "id"],
                condition=Q(resolution="", released_at__isnull=False),
                name="released_dead_letters",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.consumer} {self.event_id} {self.reason}"

    @property
    def state(self) -> str:
        """What is to happen, or has happened: open, released, replayed, discarded."""
        if self.resolution == "" and self.released_at is not None:
            return "released"
        return self.resolution or "open"

    def text_key(self) -> str:
        """The record's key, readable; "-" when it has none."""
        return "-" if self.key is None else bytes(self.key).decode(errors="backslashreplace")

    def text_headers(self) -> list[tuple[str, str]]:
        """The record's headers, readable: bytes that are no text are escaped."""
        return [(name, b64decode(value).decode(errors="backslashreplace")) for name, value in self.headers]


class ConsumerPause(models.Model):
    """While its row is there, all members of the consumer stay in the group and handle nothing."""

    consumer = models.CharField(max_length=100, primary_key=True)
    paused_at = models.DateTimeField(db_default=Now())
    paused_by = models.CharField(max_length=150, help_text='The operator, or "failure guard".')
    reason = models.TextField()

    class Meta:
        verbose_name = "consumer pause"
        permissions = [("pause_consumer", "Can pause and resume consumers")]
        ordering = ["consumer"]

    def __str__(self) -> str:
        return f"{self.consumer} is paused"


class RelayPause(models.Model):
    """While its row is there, the leader keeps the lead and publishes nothing, whoever leads."""

    id = models.PositiveSmallIntegerField(primary_key=True, default=1)
    paused_at = models.DateTimeField(db_default=Now())
    paused_by = models.CharField(max_length=150, help_text="The operator.")
    reason = models.TextField()

    class Meta:
        verbose_name = "relay pause"
        constraints = [models.CheckConstraint(condition=Q(id=1), name="relay_pause_is_one_row")]

    def __str__(self) -> str:
        return "the relay is paused"


def is_alive() -> Case:
    """The condition that a worker is heard of and has not stopped."""
    heard_of = Q(stopped_at__isnull=True, seen_at__gt=Now() - timedelta(seconds=Worker.ALIVE_SECONDS))
    return Case(When(heard_of, then=True), default=False, output_field=models.BooleanField())


class WorkerQuerySet(models.QuerySet["Worker"]):
    def alive(self) -> "WorkerQuerySet":
        """Those that are heard of and have not stopped. By the database's clock, which writes the times as well."""
        return self.filter(is_alive())

    def with_life(self) -> "WorkerQuerySet":
        """Each with `is_alive`, and `read_at`: the database's time now, to tell ages by."""
        return self.annotate(is_alive=is_alive(), read_at=Now())


class Worker(models.Model):
    """One start of a relay, a consumer or another worker, as it says of itself: see `heartbeats`.

    A consumer that shares its process with others has a row of its own. The id is drawn at each start: host and pid
    come again, in containers all the time. Few rows, and none older than a day, so the primary key is the only index:
    a heartbeat then changes no index entry.
    """

    ALIVE_SECONDS: ClassVar[float] = 20.0
    """Not heard of for so long, a worker counts as gone: it speaks every five seconds."""

    class Kind(models.TextChoices):
        RELAY = "relay", "relay"
        CONSUMER = "consumer", "consumer"
        OTHER = "other", "other"  # another long-running command of the project

    id = models.UUIDField(primary_key=True, default=uuid4, editable=False)
    kind = models.CharField(max_length=10, choices=Kind.choices)
    name = models.CharField(max_length=100, help_text='The consumer\'s name; "relay" for a relay.')
    host = models.CharField(max_length=255)
    pid = models.IntegerField()
    started_at = models.DateTimeField(db_default=Now())
    seen_at = models.DateTimeField(db_default=Now(), help_text="When it last said that it works.")
    stopped_at = models.DateTimeField(null=True, help_text="When it stopped in order. A killed one says nothing.")
    state = models.CharField(max_length=64, help_text="What it does: leads, stands by, works, paused, waits for ...")
    state_since = models.DateTimeField(db_default=Now())
    last_error = models.TextField(default="", blank=True, help_text="The last thing that went wrong, if any did.")
    last_error_at = models.DateTimeField(null=True)
    events_total = models.BigIntegerField(default=0, help_text="Published or handled since it started.")
    events_per_second = models.FloatField(default=0, help_text="Over about the last ten seconds.")
    assignment = models.JSONField(default=list, help_text="A consumer's partitions, as topic/partition.")
    metrics_port = models.IntegerField(null=True, help_text="Where it serves /metrics and /livez; null: nowhere.")

    objects: ClassVar[Any] = WorkerQuerySet.as_manager()

    class Meta:
        verbose_name = "worker"
        ordering = ["kind", "name", "-started_at"]

    def __str__(self) -> str:
        return f"{self.name} on {self.host}:{self.pid}"


class OperatorActionQuerySet(models.QuerySet["OperatorAction"]):
    def about_letter(self, letter: DeadLetter) -> "OperatorActionQuerySet":
        """What was done about a dead letter, in order."""
        return self.filter(subject=str(letter.pk), action__startswith="dead_letter.").order_by("id")


class OperatorAction(models.Model):
    """The audit trail: what an operator, or a guard, did to consumers and dead letters. Rows are never changed."""

    at = models.DateTimeField(db_default=Now())
    by = models.CharField(max_length=150, help_text="User of the admin, user@host of a command, or the guard.")
    action = models.CharField(max_length=64, help_text="E.g. dead_letter.replayed, consumer.paused, offsets.reset.")
    consumer = models.CharField(max_length=100)
    subject = models.CharField(max_length=255, help_text="What it was done to, e.g. the id of a dead letter.")
    reason = models.TextField(default="", blank=True)
    detail = models.JSONField(default=dict, blank=True)

    objects: ClassVar[Any] = OperatorActionQuerySet.as_manager()

    class Meta:
        verbose_name = "operator action"
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["consumer", "-id"], name="operator_action_consumer"),
            models.Index(fields=["subject"], name="operator_action_subject"),
        ]

    def __str__(self) -> str:
        return f"{self.action} {self.subject} by {self.by}"

    def why(self) -> str:
        """The reason that was given, or the error that came of it."""
        return str(self.reason or self.detail.get("error", ""))
