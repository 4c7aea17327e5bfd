"""Publishing again what the relay has published already, in order, with the same ids."""

from django.db.models import Exists, OuterRef, Q

from .conf import outbox_settings
from .exceptions import LeadershipLost
from .handlers import Consumer, consumers
from .leader import Leader, open_session
from .models import OutboxEvent, OutboxEventQuerySet, ProcessedEvent, RelayCursor
from .relay import republish


def replay_unhandled() -> int:
    """Publish again the events that are past the cursor and that some consumer has not handled. Return how many.

    For a broker that lost its records. Runs under the leader lock, so nothing is published beside it.
    Raises LeadershipLost when a relay leads or the database session is lost, ProducerBroken when the Kafka client
    fails.
    """
    with open_session() as session:
        leader = Leader(session)
        if not leader.try_lead():
            raise LeadershipLost("a relay leads: stop it first")
        # This session idles while the other one looks through the whole table.
        session.execute("SELECT set_config('idle_session_timeout', '0', false)")
        ids = unhandled(RelayCursor.read()).order_by("id").values_list("id", flat=True)
        return republish(leader, ids.iterator(), outbox_settings().BATCH_SIZE)


def unhandled(cursor: RelayCursor) -> OutboxEventQuerySet:
    """Published events of a type that some registered consumer handles but has no processed mark of."""
    wanted = Q(pk__in=[])
    for consumer in consumers():
        mark = ProcessedEvent.objects.filter(consumer=consumer.name, event_id=OuterRef("event_id"))
        wanted |= _handled_types(consumer) & ~Q(Exists(mark))
    events: OutboxEventQuerySet = OutboxEvent.objects.past(cursor).filter(wanted, undeliverable__isnull=True)
    return events


def _handled_types(consumer: Consumer) -> Q:
    condition = Q(pk__in=[])
    for event_type in consumer.event_types:
        if event_type.endswith("*"):
            condition |= Q(event_type__startswith=event_type.removesuffix("*"))
        else:
            condition |= Q(event_type=event_type)
    return condition
