"""The operator's view of events and consumers.

Lists are read-only; what an operator does is an action, and is logged. No list counts a big table to its end.
"""

from . import consumers, dead_letters, events, relay, undeliverable, workers  # noqa: F401  (they register their models)
from .read_only import ReadOnlyAdmin

__all__ = ["ReadOnlyAdmin"]
