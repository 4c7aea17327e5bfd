"""What one attempt to deliver comes to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """`error`: empty when it arrived. `may_try_again`: trying again may help, and sends nothing twice.

    `is_receivers`: the receiver failed, and so would what else waits for it. `wait_seconds`: how long it wants to be
    left alone. `wants_no_more`: it wants nothing more at all.
    """

    error: str = ""
    may_try_again: bool = False
    is_receivers: bool = False
    wait_seconds: float = 0.0
    wants_no_more: bool = False
