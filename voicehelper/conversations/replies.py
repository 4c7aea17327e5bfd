"""The assistant's reply from the question to the stored message, and its form as server-sent events."""

import logging
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import copy_context
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.db import connection
from rest_framework.renderers import JSONRenderer

from monitoring.failures import error_type
from voicehelper.assistant.attempts import Signal
from voicehelper.assistant.orchestrator import Answer, generate
from voicehelper.assistant.providers import FailureReason, ProviderFailed
from voicehelper.identity.models import User
from voicehelper.problems import problem

from .models import Message
from .serializers import MessageSerializer
from .services import (
    REPLY_LEASE,
    ConversationEnded,
    Reply,
    ReplyLost,
    abandon_reply,
    fail_reply,
    finish_reply,
    prolong_reply,
)

logger = logging.getLogger(__name__)

PROLONG_SECONDS = REPLY_LEASE.total_seconds() / 3
FAILURES = {
    FailureReason.TIMEOUT: (HTTPStatus.GATEWAY_TIMEOUT, "The language model has not answered in time."),
    FailureReason.RATE_LIMITED: (HTTPStatus.SERVICE_UNAVAILABLE, "The language model has too much to do."),
    FailureReason.ERROR: (HTTPStatus.BAD_GATEWAY, "The language model has failed to answer."),
}
ENDED = "The conversation has ended."
LOST = "The reply took too long and was given up."


class TooManyReplies(Exception):
    """This process works on as many replies as it may: what else it serves needs threads, too."""


class ReplyBroken(Exception):
    """An event stream has ended with an error of the server's own: its request is counted as failed."""


class _Places:
    """Those of replies in this process: each takes a thread for as long as the provider needs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take one for the time of the block. Raises TooManyReplies."""
        with self._lock:
            if self._taken >= settings.ASSISTANT.max_replies:
                raise TooManyReplies
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1


_places = _Places()


def reply_to(*, user: User, reply: Reply) -> Generator[str | Signal | Message, None, None]:
    """Carry out a reply that has begun: yield its text as it comes, among signals, and the stored message at last.

    The first is a TICK, before anything is done, or TooManyReplies is raised. Raises ProviderFailed when the provider
    was given up: the conversation has failed then; ConversationEnded, ReplyLost when the reply is not wanted any more.
    Closing it stops the provider, and lets another reply begin. No transaction is open while the provider talks.
    """
    prolonged = time.monotonic()
    is_over = False
    generation = generate(
        tenant_id=reply.tenant_id,
        conversation_id=reply.conversation_id,
        mode=reply.mode,
        turns=reply.turns,
        earlier_messages=reply.earlier_messages,
    )
    try:
        with _places.taken(), closing(generation):
            for piece in generation:
                if isinstance(piece, Answer):
                    _check_connection()
                    message = finish_reply(user=user, reply=reply, answer=piece)
                    is_over = True
                    yield message
                    return
                yield piece
                if time.monotonic() - prolonged >= PROLONG_SECONDS:
                    _check_connection()
                    prolong_reply(reply=reply)
                    prolonged = time.monotonic()
    except ProviderFailed as failure:
        logger.warning("the provider was given up: %s", failure.reason.value, extra=_ids(reply))
        _check_connection()
        with suppress(ConversationEnded, ReplyLost):  # then it is not this reply's to fail
            fail_reply(user=user, reply=reply, reason=failure.reason.value)
        is_over = True
        raise
    finally:
        if not is_over:
            _check_connection()
            abandon_reply(reply=reply)


def _check_connection() -> None:
    """Have the next query connect anew where it must: the database may have been restarted since the last one."""
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()


def whole_reply(*, user: User, reply: Reply) -> Message:
    """Carry out a reply that has begun, and return the stored message. Raises what `reply_to()` raises."""
    for piece in reply_to(user=user, reply=reply):
        if isinstance(piece, Message):
            return piece
    raise AssertionError("unreachable")


class EventStream:
    """A reply as server-sent events (WHATWG HTML): `token`, `restart`, `message`, `error`; for a streaming response.

    | event | data, JSON |
    |---|---|
    | `token` | `{"text": ...}`: a part of the reply, to be appended |
    | `restart` | `{}`: the provider broke off and begins anew; the tokens so far do not count |
    | `message` | the stored message; nothing comes after it |
    | `error` | a problem (RFC 9457), with `reason` when the provider was given up; nothing comes after it |

    A comment (`:`) comes at the beginning, and every second in which there is nothing else: a client that has gone is
    noticed by that. The work is done in the context in which this is made, whoever iterates: a response is iterated
    when its request's context is gone. Making it raises TooManyReplies.
    """

    def __init__(self, *, user: User, reply: Reply, path: str) -> None:
        self._context = copy_context()
        self._frames = _frames(user, reply, path)
        # Begun at once: what has not begun is not cleaned up when it is closed.
        self._first: bytes | None = self._context.run(next, self._frames)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return self._context.run(next, self._frames)

    def close(self) -> None:
        """Stop, also the provider; for the server, whatever has ended the response."""
        self._first = None
        self._context.run(self._frames.close)


def _frames(user: User, reply: Reply, path: str) -> Generator[bytes, None, None]:
    try:
        with closing(reply_to(user=user, reply=reply)) as pieces:
            for piece in pieces:
                if isinstance(piece, Message):
                    yield _frame("message", MessageSerializer(piece).data)
                elif piece is Signal.TICK:
                    yield b":\n\n"
                elif piece is Signal.RESTART:
                    yield _frame("restart", {})
                else:
                    yield _frame("token", {"text": piece})
    except ProviderFailed as failure:
        status, detail = FAILURES[failure.reason]
        body = problem(status=status, detail=detail, path=path)
        yield _frame("error", body | {"reason": failure.reason.value})
    except (ConversationEnded, ReplyLost) as error:
        detail = ENDED if isinstance(error, ConversationEnded) else LOST
        yield _frame("error", problem(status=HTTPStatus.CONFLICT, detail=detail, path=path))
    except TooManyReplies:  # at the beginning, when there can be an answer of another status
        raise
    except Exception as error:
        # Where, and not what: the texts of errors quote what was said, and whoever iterates logs what is raised here.
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("a reply failed: %s\n%s", error_type(error), where, extra=_ids(reply))
        detail = "The server failed to answer; its log tells more under the correlation id."
        yield _frame("error", problem(status=HTTPStatus.INTERNAL_SERVER_ERROR, detail=detail, path=path))
        raise ReplyBroken("a reply failed: see the line before") from None


def _ids(reply: Reply) -> dict[str, str]:
    return {"conversation_id": str(reply.conversation_id)}


def _frame(event: str, data: Any) -> bytes:
    # JSON has no line breaks of its own, and so needs one `data:` line.
    return b"event: %s\ndata: %s\n\n" % (event.encode(), JSONRenderer().render(data))
