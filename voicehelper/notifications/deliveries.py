"""What becomes of a delivery: claimed, sent, tried again, given up.

                     claim, committed before anything is sent
      ┌─▶ pending ────────────────────────────────────────────▶ sending ──▶ sent      notification.sent
      │    │ ▲          it said no, or was not reached             │  └───▶ failed    notification.failed
      │    │ └─────────────────────────────────────────────────────┤         ▲ │
      │    └── its day is over ────────────────────────────────────┼─────────┘ │
      │      webhook: the worker died meanwhile                    │           │ an operator has it tried again
      │                                                            │           │
      │      e-mail: the worker died meanwhile ─▶ failed           │           │
      └────────────────────────────────────────────────────────────┴───────────┘

The claim is committed first, so two workers never send the same, and what a worker that died was about to send is
known: it stays "sending". Nobody can tell whether it went out. An e-mail must not arrive twice, so it has failed with
an unknown outcome; a webhook is posted again, as its receiver knows the `webhook-id` again.

An attempt is known by when it began: a worker that was thought dead and comes back records nothing any more.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar, cast
from uuid import UUID

from django.db import InterfaceError, OperationalError, connection, transaction
from django.utils import timezone

from events_outbox import RetryPolicy, emit_event
from events_outbox.heartbeats import Kind, State, Vitals
from events_outbox.operators import note_action
from voicehelper.proto.notification_pb2 import NotificationFailedPayload, NotificationSentPayload

from . import mail, webhooks
from .events import NOTIFICATION_FAILED, NOTIFICATION_SENT
from .models import Channel, Delivery, WebhookEndpoint, give_up_at
from .outcomes import Outcome
from .services import METADATA, prune

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

RETRY = RetryPolicy(max_retries=7, initial_delay_seconds=10, multiplier=3, max_delay_seconds=3600, jitter=0.5)
"""10 s, 30 s, 90 s, ... up to an hour, each less up to a half: some two hours in all."""
LEASE = {Channel.EMAIL.value: timedelta(minutes=15), Channel.WEBHOOK.value: timedelta(minutes=5)}
"""What has been "sending" for longer was left by a worker that died. No attempt takes so long: a mail server is waited
for a dozen times, each time for EMAIL_TIMEOUT_SECONDS, which are 60 at most."""
SLOW_SECONDS = 1.0
"""A receiver that takes longer to say yes is left alone for as long: others' turn."""
AT_ONCE = 100
"""So many deliveries are given up, or taken back, in one transaction."""
IDLE_SECONDS = 0.5
LOOK_SECONDS = 10.0
"""How often what was abandoned, is too late or too old is looked for."""
RECONNECT_SECONDS = 1.0


# -- writes


@transaction.atomic
def claim_delivery(*, channel: str) -> Delivery | None:
    """Take what is due longest, and say so in the database; None when nothing is due."""
    # By the database's clock, or what a worker whose clock is behind has just begun to send is taken for abandoned.
    due = Delivery.objects.due(channel).with_now()
    delivery = due.select_for_update(skip_locked=True).first()
    if delivery is None:
        return None
    delivery.state, delivery.claimed_at = Delivery.State.SENDING, delivery.now
    delivery.attempts += 1
    delivery.save(update_fields=["state", "claimed_at", "attempts"])
    return cast(Delivery, delivery)


@transaction.atomic
def record_outcome(
    *, delivery: Delivery, outcome: Outcome, retry: RetryPolicy = RETRY, took_seconds: float = 0.0
) -> bool:
    """Note what an attempt came to; emit notification.sent, or notification.failed when it was the last one.

    False, and nothing noted, when the attempt is no longer this worker's.
    """
    ours = Delivery.objects.filter(id=delivery.id, state=Delivery.State.SENDING, claimed_at=delivery.claimed_at)
    row = ours.with_now().select_for_update(no_key=True).first()
    if row is None:
        return False
    now = row.now
    row.last_error = outcome.error
    if not outcome.error:
        row.state, row.finished_at = Delivery.State.SENT, now
    elif outcome.may_try_again and row.attempts <= retry.max_retries and now < row.give_up_at:
        row.state = Delivery.State.PENDING
        row.next_attempt_at = now + _pause(retry, row.attempts, outcome)
    else:
        row.state, row.finished_at = Delivery.State.FAILED, now
    row.save(update_fields=["state", "last_error", "finished_at", "next_attempt_at"])
    if row.endpoint_id is not None:
        _note_endpoint(row.endpoint_id, outcome, retry, now, took_seconds)
    if row.state != Delivery.State.PENDING:
        _emit(row)
    return True


def _pause(retry: RetryPolicy, failures: int, outcome: Outcome) -> timedelta:
    delays = retry.delays_seconds() or [0.0]
    return timedelta(seconds=max(delays[min(failures, len(delays)) - 1], outcome.wait_seconds))


def _note_endpoint(endpoint_id: UUID, outcome: Outcome, retry: RetryPolicy, now: datetime, took_seconds: float) -> None:
    """Count the endpoint's failures. While it fails, what else is for it waits; when it is back, all goes out.

    A receiver that is away would otherwise take all workers' time with what its tenant has for it, and so would one
    that takes its time to say yes.
    """
    if outcome.error and not outcome.is_receivers:
        return
    waiting = Delivery.objects.waiting_for(endpoint_id)
    endpoint = WebhookEndpoint.objects.select_for_update(no_key=True).get(id=endpoint_id)
    was_failing = endpoint.failures > 0
    if outcome.error:
        endpoint.failures += 1
        endpoint.active = endpoint.active and not outcome.wants_no_more
        rest = _pause(retry, endpoint.failures, outcome)
    else:
        endpoint.failures = 0
        rest = timedelta(seconds=took_seconds if took_seconds > SLOW_SECONDS else 0.0)
        if not (was_failing or rest):
            return
    until = now + rest
    endpoint.resting_until = until if rest else None
    endpoint.save(update_fields=["failures", "active", "resting_until"])
    is_back = was_failing and not outcome.error
    (waiting if is_back else waiting.filter(next_attempt_at__lt=until)).update(next_attempt_at=until)


def _emit(delivery: Delivery) -> None:
    receiver = str(delivery.recipient_id or delivery.endpoint_id)
    about = str(delivery.notification_id or delivery.id)
    payload: NotificationSentPayload | NotificationFailedPayload
    if delivery.state == Delivery.State.SENT:
        event_type, payload = NOTIFICATION_SENT, NotificationSentPayload()
    else:
        event_type, payload = NOTIFICATION_FAILED, NotificationFailedPayload(error=delivery.last_error)
    payload.notification_id, payload.recipient_id = about, receiver
    payload.channel, payload.kind, payload.attempts = delivery.channel, delivery.kind, delivery.attempts
    emit_event(
        event_type,
        payload,
        aggregate_id=about,
        tenant_id=delivery.tenant_id,
        metadata=METADATA,
        correlation_id=delivery.correlation_id or None,
        causation_id=str(delivery.event_id),
    )


@transaction.atomic
def take_back_abandoned(*, channel: str) -> int:
    """Decide about what workers that died have left "sending": see above. Return how many there were."""
    abandoned = Delivery.objects.abandoned(channel, LEASE[channel]).select_for_update(skip_locked=True)[:AT_ONCE]
    for delivery in abandoned:
        logger.warning("delivery was abandoned", extra={"delivery": str(delivery.id), "channel": channel})
        died = "The worker died while it was sent."
        if channel == Channel.WEBHOOK:
            record_outcome(delivery=delivery, outcome=Outcome(died, may_try_again=True))
        else:
            record_outcome(delivery=delivery, outcome=Outcome(f"{mail.UNKNOWN_OUTCOME} {died}"))
    return len(abandoned)


@transaction.atomic
def give_up_overdue(*, channel: str) -> int:
    """Fail what has waited for too long, and emit notification.failed. Return how many there were.

    Otherwise what waits for a receiver that never comes back would pile up, and be sent when it is no news any more.
    """
    overdue = Delivery.objects.overdue(channel).with_now().select_for_update(skip_locked=True)[:AT_ONCE]
    for delivery in overdue:
        delivery.state, delivery.finished_at = Delivery.State.FAILED, delivery.now
        delivery.last_error = f"Given up: its time is over. {delivery.last_error}".strip()
        delivery.save(update_fields=["state", "finished_at", "last_error"])
        _emit(delivery)
    return len(overdue)


@transaction.atomic
def retry_deliveries(*, deliveries: Iterable[Delivery], by: str) -> list[Delivery]:
    """Have failed deliveries tried again, all attempts anew, and note it in the audit trail. Return which.

    Those that are not failed are left out. `by`: the operator.
    """
    wanted = [delivery.pk for delivery in deliveries]
    failed = Delivery.objects.filter(pk__in=wanted, state=Delivery.State.FAILED)
    chosen = list(failed.select_for_update(no_key=True).order_by("id"))
    now, until = timezone.now(), give_up_at()
    for delivery in chosen:
        delivery.state, delivery.attempts, delivery.finished_at = Delivery.State.PENDING, 0, None
        delivery.next_attempt_at, delivery.give_up_at = now, until
        delivery.save(update_fields=["state", "attempts", "finished_at", "next_attempt_at", "give_up_at"])
        # Not the error: it has words of the receiver's in it, and what is noted is logged.
        note_action("delivery.retried", consumer="", subject=str(delivery.id), by=by, kind=delivery.kind)
    return chosen


# -- sending


def attempt(delivery: Delivery) -> Outcome:
    """Send a claimed delivery, unless its receiver is not to have it any more."""
    if (endpoint := delivery.endpoint) is not None:
        is_wanted = endpoint.active and endpoint.deleted_at is None
        return webhooks.post(endpoint, delivery) if is_wanted else Outcome("The webhook is switched off or deleted.")
    user = delivery.recipient
    if user is None or not user.is_active or user.tenant_id != delivery.tenant_id:
        return Outcome("The user is not active in the tenant any more.")
    return mail.send(delivery, user.email)


def worker_name(channel: str) -> str:
    """What a loop is called among the workers."""
    return f"delivery {channel}"


@dataclass
class DeliveryLoop:
    """Sends what is due by one channel until told to stop. Any number of them may run, anywhere.

    `on_tick` is called at least every few seconds, but while something is being sent. `vitals`: what it says of itself.
    """

    channel: str
    on_tick: Callable[[], None] = lambda: None
    retry: RetryPolicy = RETRY
    until_idle: bool = False
    vitals: Vitals = field(default_factory=lambda: Vitals(Kind.OTHER, "delivery"))

    def __post_init__(self) -> None:
        self.on_tick = self.vitals.with_tick(self.on_tick)
        self._stopping = False  # a plain flag: it is set in a signal handler
        self._looked = float("-inf")

    def stop(self) -> None:
        """Ask the loop to stop; safe in a signal handler. What is being sent is finished."""
        self._stopping = True

    def run(self) -> None:
        """Return after `stop()`; with `until_idle`, once nothing is due. A database that is away is waited for."""
        with self.vitals.life():
            while not self._stopping:
                self.on_tick()
                if not self._with_database(self.deliver_next) and not self._stopping:
                    if self.until_idle:
                        return
                    self._pause(IDLE_SECONDS)

    def deliver_next(self) -> bool:
        """Send what is due longest; now and then tidy up before. False when there is nothing to do."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            prune()
            found = (take_back_abandoned(channel=self.channel), give_up_overdue(channel=self.channel))
            if max(found) >= AT_ONCE:  # there may be more
                return True
            self._looked = time.monotonic()
        delivery = claim_delivery(channel=self.channel)
        if delivery is None:
            return False
        started = time.monotonic()
        outcome = self._attempt(delivery)
        took_seconds = time.monotonic() - started
        self.vitals.rate.count(1)
        if outcome.error:
            self.vitals.failed(outcome.error)
        # The outcome is known by now, and is not to get lost with a session.
        noted = self._with_database(
            lambda: record_outcome(delivery=delivery, outcome=outcome, retry=self.retry, took_seconds=took_seconds)
        )
        logger.info(
            "delivery attempted",
            extra={
                "delivery": str(delivery.id),
                "channel": self.channel,
                "kind": delivery.kind,
                "attempt": delivery.attempts,
                "arrived": not outcome.error,
                "noted": bool(noted),
                "duration_ms": round(1000 * took_seconds),
            },
        )
        return True

    def _attempt(self, delivery: Delivery) -> Outcome:
        try:
            return attempt(delivery)
        except (OperationalError, InterfaceError) as error:  # who it is for was not found out: nothing was sent
            return Outcome(f"The database was away: {type(error).__name__}", may_try_again=True)
        except Exception as error:
            # Whatever is wrong with this one must not keep the others waiting.
            logger.exception("delivery failed unexpectedly", extra={"delivery": str(delivery.id)})
            return Outcome(f"Unexpected error: {type(error).__name__}")

    def _with_database(self, work: Callable[[], Answer]) -> Answer | None:
        """Run `work`, again while the database is away. None when told to stop meanwhile."""
        while True:
            try:
                answer = work()
                self.vitals.say(State.WORKS)
                return answer
            except (OperationalError, InterfaceError) as error:
                if connection.in_atomic_block:
                    raise
                self.vitals.failed(error)
                self.vitals.say(State.WAITS_FOR_DATABASE)
                logger.warning("database away, waiting", extra={"error": str(error).strip()})
                connection.close()
            if self._stopping:
                return None
            self._pause(RECONNECT_SECONDS)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            self.on_tick()
            time.sleep(min(left, 0.2))
