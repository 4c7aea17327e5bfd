"""What an operator does with undeliverable events: find, redrive, discard. For the admin and the command.

Undeliverable events of one key (topic and aggregate id) wait in order: first the one that the broker refused, then
its followers. So a key is redriven whole. A refused event that is discarded makes way for its followers, which had
only waited for it.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from django.db import transaction
from django.db.models import Exists, OuterRef
from django.utils import timezone

from .models import UndeliverableEvent, UndeliverableEventQuerySet
from .operators import note_action
from .publisher import BEHIND

logger = logging.getLogger(__name__)

NOTED_IDS = 500
"""Events of one discard that the audit trail lists."""


class ActionRefused(Exception):
    """What was asked for cannot be done, and nothing was changed; the text says why."""


@dataclass(frozen=True)
class Redriven:
    """What a redrive asks the relay to publish, or would ask it for."""

    events: int
    keys: int


@dataclass(frozen=True)
class Discarded:
    """What is discarded, or would be: `events`, and the followers that are redriven because of it."""

    events: int
    redriven: Redriven


def redrive(chosen: UndeliverableEventQuerySet, *, by: str, dry_run: bool = False, chosen_by: str = "") -> Redriven:
    """Ask the relay to publish the keys of the chosen events, each whole and in order. It does within seconds.

    `by`: the operator; `chosen_by`: how the events were chosen, in words; both for the audit trail. Discarded events
    among the chosen are left out: see `with_ids()`.
    """
    with transaction.atomic():
        redriven = _request_redrive(_same_keys(chosen.open()), dry_run)
        if not dry_run and redriven.events:
            note_action(
                "undeliverable.redriven",
                consumer="",
                subject=chosen_by or "undeliverable events",
                by=by,
                events=redriven.events,
                keys=redriven.keys,
            )
    if not dry_run and redriven.events:
        logger.info("redrive requested", extra={"events": redriven.events, "keys": redriven.keys, "by": by})
    return redriven


def discard(ids: Collection[int], *, reason: str, by: str, dry_run: bool = False) -> Discarded:
    """Give undeliverable events up, by their ids: they stay visible, and hold back nothing any more.

    A key whose refused event is discarded goes on: its followers are redriven. `reason` and `by` (the operator, at
    most 150 characters are kept) stay with the event. Raises ActionRefused for a missing reason, for ids that are
    unknown, discarded already, or about to be published by a redrive.
    """
    if not reason.strip():
        raise ActionRefused("say why: a reason stays with the discarded event")
    with transaction.atomic():
        # Locked, so that a redrive that is requested meanwhile waits and then finds them discarded.
        chosen = list(with_ids(ids).select_for_update().order_by("id"))
        if requested := [parked.pk for parked in chosen if parked.redrive_requested_at is not None]:
            raise ActionRefused(f"a redrive is requested, they may be on their way: {_listed(requested)}")
        freed = _freed(with_ids(ids))
        discarded = Discarded(len(chosen), _request_redrive(freed, dry_run))
        if not dry_run:
            UndeliverableEvent.objects.filter(pk__in=ids).update(
                discarded_at=timezone.now(), discarded_by=by[:150], discard_reason=reason.strip()
            )
            note_action(
                "undeliverable.discarded",
                consumer="",
                subject=f"undeliverable {_listed(sorted(ids))}",
                by=by,
                reason=reason.strip(),
                events=discarded.events,
                redriven=discarded.redriven.events,
                event_ids=[parked.event_id for parked in chosen[:NOTED_IDS]],
            )
    if not dry_run:
        for parked in chosen:
            logger.warning(
                "undeliverable event discarded",
                extra={
                    "undeliverable": parked.pk,
                    "outbox_id": parked.event_id,
                    "topic": parked.topic,
                    "aggregate_id": parked.aggregate_id,
                    "reason": reason.strip(),
                    "by": by,
                },
            )
    return discarded


def with_ids(ids: Collection[int]) -> UndeliverableEventQuerySet:
    """The open undeliverable events with these ids. Raises ActionRefused unless each is one."""
    known = dict(UndeliverableEvent.objects.filter(pk__in=ids).values_list("pk", "discarded_at"))
    if unknown := sorted(set(ids) - set(known)):
        raise ActionRefused(f"no undeliverable event {_listed(unknown)}: published meanwhile, or never there")
    if closed := sorted(pk for pk, discarded_at in known.items() if discarded_at is not None):
        raise ActionRefused(f"discarded already: {_listed(closed)}")
    found: UndeliverableEventQuerySet = UndeliverableEvent.objects.open().filter(pk__in=ids)
    return found


def _same_keys(chosen: UndeliverableEventQuerySet) -> UndeliverableEventQuerySet:
    """The open events of the same keys as the chosen ones."""
    of_key = chosen.order_by().filter(topic=OuterRef("topic"), aggregate_id=OuterRef("aggregate_id"))
    same: UndeliverableEventQuerySet = UndeliverableEvent.objects.open().filter(Exists(of_key))
    return same


def _freed(given_up: UndeliverableEventQuerySet) -> UndeliverableEventQuerySet:
    """The open events that nothing holds back without these: of their keys, those that begin with a follower then."""
    left = _same_keys(given_up).exclude(pk__in=given_up.values("pk"))
    free: dict[tuple[str, str], bool] = {}
    ids = []
    for pk, topic, aggregate_id, reason in left.order_by("id").values_list("id", "topic", "aggregate_id", "reason"):
        if free.setdefault((topic, aggregate_id), reason == BEHIND):
            ids.append(pk)
    freed: UndeliverableEventQuerySet = UndeliverableEvent.objects.open().filter(pk__in=ids)
    return freed


def _request_redrive(waiting: UndeliverableEventQuerySet, dry_run: bool) -> Redriven:
    keys = waiting.order_by().values("topic", "aggregate_id").distinct().count()
    return Redriven(waiting.count() if dry_run else waiting.update(redrive_requested_at=timezone.now()), keys)


def _listed(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    return ", ".join(map(str, ids[:10])) + more
