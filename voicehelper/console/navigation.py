"""What the sidebar leads to, as far as the user may go there."""

from typing import Any

from django.apps import apps
from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse

# Title, icon, model. Icons: names of Material Symbols, which the theme brings along.
SECTIONS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Events",
        (
            ("Events", "bolt", "events_outbox.OutboxEvent"),
            ("Undeliverable", "unsubscribe", "events_outbox.UndeliverableEvent"),
            ("Dead letters", "mark_email_unread", "events_outbox.DeadLetter"),
            ("Processed", "task_alt", "events_outbox.ProcessedEvent"),
            ("Workers", "memory", "events_outbox.Worker"),
            ("Paused consumers", "pause_circle", "events_outbox.ConsumerPause"),
            ("Relay", "sync_alt", "events_outbox.RelayCursor"),
            ("Operator actions", "history", "events_outbox.OperatorAction"),
        ),
    ),
    (
        "Services",
        (
            ("Conversations", "forum", "conversations.Conversation"),
            ("Messages", "chat", "conversations.Message"),
            ("Documents", "description", "knowledge.Document"),
            ("Notifications", "notifications", "notifications.Notification"),
            ("Deliveries", "outgoing_mail", "notifications.Delivery"),
            ("Webhooks", "webhook", "notifications.WebhookEndpoint"),
            ("Preferences", "tune", "notifications.NotificationPreference"),
            ("Daily totals", "monitoring", "analytics.DailyTotal"),
            ("Audit log", "fact_check", "audit.AuditEntry"),
        ),
    ),
    (
        "Access",
        (
            ("Tenants", "domain", "identity.Tenant"),
            ("Users", "group", "identity.User"),
            ("Roles", "shield_person", "auth.Group"),
            ("API tokens", "key", "identity.ApiToken"),
        ),
    ),
)


def navigation(request: HttpRequest) -> list[dict[str, Any]]:
    """The sidebar's sections for this user, in the form of the theme's setting `SIDEBAR["navigation"]`."""
    overview = {"title": "Overview", "icon": "monitor_heart", "link": reverse("admin:index")}
    sections = [{"title": "", "items": [overview]}]
    for title, entries in SECTIONS:
        items = [
            {"title": name, "icon": icon, "link": reverse(_list_of(model))}
            for name, icon, model in entries
            if _may_look(request, model)
        ]
        if items:
            sections.append({"title": title, "items": items})
    return sections


def _list_of(model: str) -> str:
    app_label, name = model.lower().split(".")
    return f"admin:{app_label}_{name}_changelist"


def _may_look(request: HttpRequest, model: str) -> bool:
    found = apps.get_model(model)
    return admin.site.is_registered(found) and admin.site.get_model_admin(found).has_view_permission(request)
