"""POSTs that may be sent again: the header Idempotency-Key, and the answers that are kept for it."""
