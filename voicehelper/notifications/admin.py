"""Notifications, what goes out of them, and where to, in the admin: to look at, and to have tried again."""

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.http import HttpRequest, HttpResponse

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.cells import moment, one_line
from events_outbox.admin.confirmation import chosen_again, confirm, is_confirmed
from events_outbox.admin.filters import ChoiceFilter, FieldChoiceFilter
from events_outbox.admin.read_only import AT_ONCE

from .deliveries import retry_deliveries
from .kinds import KINDS
from .models import Channel, Delivery, Notification, NotificationPreference, WebhookEndpoint


class ReadFilter(admin.SimpleListFilter):
    title = parameter_name = "read"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "read"), ("no", "unread")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(read_at__isnull=self.value() == "no") if self.value() in ("yes", "no") else queryset


@admin.register(Notification)
class NotificationAdmin(ReadOnlyAdmin):
    list_display = ["subject", "recipient", "tenant", "kind", "created", "read"]
    list_filter = [ReadFilter]
    list_select_related = ["recipient", "tenant"]
    list_defer = ["body"]
    time_field = "created_at"
    exact_search = ["id", "recipient__username"]
    search_fields = ["=aggregate_id"]
    search_help_text = "an id, user name or aggregate id, whole"
    payload_fields = ["body"]

    @admin.display(description="created")
    def created(self, notification: Notification) -> str:
        return moment(notification.created_at)

    @admin.display(description="read")
    def read(self, notification: Notification) -> str:
        return moment(notification.read_at)


class StateFilter(FieldChoiceFilter):
    title = parameter_name = field = "state"


class ChannelFilter(FieldChoiceFilter):
    title = parameter_name = field = "channel"


class KindFilter(ChoiceFilter):
    title = parameter_name = field = "kind"
    choices_of = staticmethod(lambda: sorted(KINDS))


@admin.register(Delivery)
class DeliveryAdmin(ReadOnlyAdmin):
    list_display = ["created", "state", "channel", "kind", "receiver", "tenant", "attempts", "next_attempt", "error"]
    list_filter = [StateFilter, ChannelFilter, KindFilter]
    list_select_related = ["recipient", "endpoint", "tenant"]
    list_defer = ["body", "body_html"]
    time_field = "created_at"
    exact_search = ["id", "event_id"]
    search_help_text = "an id or event id, whole"
    payload_fields = ["body", "body_html"]
    actions = ["retry"]

    @admin.display(description="created")
    def created(self, delivery: Delivery) -> str:
        return moment(delivery.created_at)

    @admin.display(description="to")
    def receiver(self, delivery: Delivery) -> str:
        return str(delivery.recipient or delivery.endpoint)

    @admin.display(description="next attempt")
    def next_attempt(self, delivery: Delivery) -> str:
        return moment(delivery.next_attempt_at if delivery.state == Delivery.State.PENDING else None)

    @admin.display(description="last error")
    def error(self, delivery: Delivery) -> str:
        return one_line(delivery.last_error)

    def has_retry_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("notifications.retry_delivery"))

    def page_buttons(self, request: HttpRequest, obj: Delivery) -> list[tuple[str, str, str]]:
        return super().page_buttons(request, obj) if obj.state == Delivery.State.FAILED else []

    @admin.action(description="Try failed ones again", permissions=["retry"])
    def retry(self, request: HttpRequest, queryset: QuerySet[Delivery]) -> HttpResponse | None:
        """Have failed deliveries tried again, when that is confirmed."""
        whole = queryset.select_related("recipient", "endpoint").order_by("id").defer(*self.list_defer)
        chosen = list(whole[: AT_ONCE + 1])
        if len(chosen) > AT_ONCE:
            self.message_user(request, f"Select at most {AT_ONCE}: filter by state and date", messages.ERROR)
            return None
        failed = [delivery for delivery in chosen if delivery.state == Delivery.State.FAILED]
        if is_confirmed(request):
            retried = retry_deliveries(deliveries=failed, by=str(request.user))
            for delivery in retried:
                self.log(request, delivery, f"to be tried again: {delivery.last_error}")
            self.message_user(request, f"{len(retried)} of {len(chosen)} deliveries are tried again within seconds")
            return None
        warnings = []
        if len(chosen) > len(failed):
            warnings.append(f"Left out: {len(chosen) - len(failed)} that have not failed.")
        if any(delivery.channel == Channel.EMAIL and "Unknown outcome" in delivery.last_error for delivery in failed):
            warnings.append("Of some nobody knows whether they were sent: these e-mails may arrive twice.")
        return confirm(
            self,
            request,
            title="Try deliveries again",
            introduction="These are sent as if they were new, with all attempts."
            if failed
            else "There is nothing to try again.",
            warnings=warnings,
            columns=("Id", "Channel", "Kind", "To", "Error"),
            rows=[(d.pk, d.channel, d.kind, self.receiver(d), d.last_error) for d in failed],
            action="retry",
            fields=chosen_again(failed),
            button=f"Try {len(failed)} again" if failed else "",
            back=request.get_full_path(),
        )


@admin.register(WebhookEndpoint)
class WebhookEndpointAdmin(ReadOnlyAdmin):
    list_display = ["url", "tenant", "active", "failures", "created", "deleted"]
    list_select_related = ["tenant"]
    time_field = "created_at"
    exact_search = ["id"]
    search_help_text = "an id, whole"
    exclude = ["salt", "previous_salt", "previous_salt_until"]  # what a secret is made of
    export_fields = ["id", "tenant_id", "url", "active", "failures", "created_by_id", "created_at", "deleted_at"]

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """No list is filtered by what may not be seen: it could be guessed letter by letter."""
        return lookup.partition(LOOKUP_SEP)[0] not in self.exclude and super().lookup_allowed(lookup, value, request)

    @admin.display(description="created")
    def created(self, endpoint: WebhookEndpoint) -> str:
        return moment(endpoint.created_at)

    @admin.display(description="deleted")
    def deleted(self, endpoint: WebhookEndpoint) -> str:
        return moment(endpoint.deleted_at)


@admin.register(NotificationPreference)
class NotificationPreferenceAdmin(ReadOnlyAdmin):
    tenant_field = "user__tenant_id"
    list_display = ["user", "kind", "channel", "enabled"]
    list_filter = [ChannelFilter, KindFilter]
    list_select_related = ["user"]
    exact_search = ["user__username"]
    search_help_text = "a user name, whole"
