"""Reading server-sent events."""

import json
from collections.abc import Iterable, Iterator
from typing import Any


def events(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield (event, data) from the lines of a stream; a comment is (":", None)."""
    event = ""
    for line in lines:
        line = line.rstrip("\n")
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield event, json.loads(line.removeprefix("data: "))
        elif line.startswith(":"):
            yield ":", None
        else:
            assert line == ""


def read(response: Any) -> list[tuple[str, Any]]:
    """All events of a test client's answer, without comments."""
    assert response.status_code == 200, response.content
    assert response["Content-Type"] == "text/event-stream"
    text = b"".join(response.streaming_content).decode()
    assert text.startswith(":\n\n") and text.endswith("\n\n")
    return [one for one in events(text.splitlines()) if one[0] != ":"]
