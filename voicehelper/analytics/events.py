"""Event types of the analytics domain. The aggregate is the tenant."""

from events_outbox import register_event
from voicehelper.proto.analytics_pb2 import BudgetExceededPayload

BUDGET_EXCEEDED = register_event("analytics.budget.exceeded", BudgetExceededPayload)
