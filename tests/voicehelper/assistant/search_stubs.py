"""Searches as `voicehelper.knowledge.search` has one, to be named in the settings."""

from dataclasses import dataclass

SECRET = "what the question was"


@dataclass
class Hit:
    text: str
    title: str
    document_id: str = "0191d1f0-0000-7000-8000-000000000001"
    score: float = 0.9


calls = []


def search(*, tenant_id, query, limit):
    calls.append((tenant_id, query, limit))
    return [
        Hit("The roadmap is public. The release is on Friday.", "Roadmap"),
        Hit("Lunch is at noon.", "Kitchen"),
        *[Hit("More.", "More")] * 20,
    ]


def failing_search(*, tenant_id, query, limit):
    raise RuntimeError(f"no index for {query}")
