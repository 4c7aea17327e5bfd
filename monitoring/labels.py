"""Label values that come from outside, kept to a bounded number."""

OTHER = "other"
"""What every further value becomes once a label has its fill."""

_seen: dict[str, set[str]] = {}


def bounded(label: str, value: object, *, limit: int = 500) -> str:
    """Return `value` as text for the first `limit` values of this label in this process, then OTHER.

    For labels whose values a client or an upstream can choose, such as a tenant or a model: each new one is a
    series of some kilobytes in the process and in Prometheus, for good. Text is cut at 100 characters.
    """
    text = str(value)[:100] or OTHER
    seen = _seen.get(label)
    if seen is None:
        seen = _seen.setdefault(label, set())
    if text not in seen:
        # What JSON may carry and UTF-8 cannot, unpaired surrogates, would fail each scrape.
        text = text.encode(errors="replace").decode()
        if text in seen:
            return text
        if len(seen) >= limit:
            return OTHER
        seen.add(text)  # two threads at once can overshoot by one: a bound, not a quota
    return text
