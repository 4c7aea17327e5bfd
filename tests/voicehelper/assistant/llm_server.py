"""A real server that speaks OpenAI's chat completions, streaming, and misbehaves as a test has it do."""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "gpt-4o-mini-2024-07-18"


@dataclass
class Asked:
    """One request that came in, and when its client went away before the answer was over."""

    headers: dict[str, str]
    body: dict
    gone: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """Does what the test has queued, one act a request."""

    protocol_version = "HTTP/1.1"
    server: "LlmServer"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked = Asked({name.lower(): value for name, value in self.headers.items()}, body)
        self.server.asked.append(self.asked)
        assert self.path == "/v1/chat/completions"
        act = self.server.acts.pop(0) if self.server.acts else says("Hello ", "there.")
        act(self)

    # --- What acts are made of ---

    def answer(self, status, content, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def begin(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def word(self, content=None, *, finish_reason=None, **fields):
        delta = {} if content is None else {"content": content}
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        about = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        self.event(about | {"choices": choices} | fields)

    def usage(self, input_tokens, output_tokens):
        assert self.asked.body["stream_options"] == {"include_usage": True}
        self.word(choices=[], usage={"prompt_tokens": input_tokens, "completion_tokens": output_tokens})

    def event(self, data):
        text = data if isinstance(data, str) else json.dumps(data)
        self.raw(f"data: {text}\n\n".encode())

    def raw(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def end(self):
        self.wfile.write(b"0\r\n\r\n")

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def wait_for_go(self, event=None):
        """Wait until the test says so, or the client has gone: then stop."""
        deadline = time.monotonic() + 20
        while not (event or self.server.may_go_on).is_set() and time.monotonic() < deadline:
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.asked.gone.set()
                raise ConnectionAbortedError
        return self

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_):
        pass


Act = Callable[[Handler], None]


def says(*words: str, usage: tuple[int, int] | None = (120, 30), finish_reason: str = "stop") -> Act:
    def act(handler):
        handler.begin()
        for word in words:
            handler.word(word)
        handler.word(finish_reason=finish_reason)
        if usage:
            handler.usage(*usage)
        handler.event("[DONE]")
        handler.end()

    return act


def says_and_waits(*words: str, then: tuple[str, ...] = ()) -> Act:
    """Say the first words, and the others when `may_go_on` is set."""

    def act(handler):
        handler.begin()
        for word in words:
            handler.word(word)
        handler.wait_for_go()
        for word in then:
            handler.word(word)
        handler.word(finish_reason="stop")
        handler.usage(120, 30)
        handler.event("[DONE]")
        handler.end()

    return act


def refuses(status: int, *, code: str | None = None, **headers: object) -> Act:
    return lambda handler: handler.answer(status, {"error": {"message": "no", "code": code}}, **headers)


def hangs(handler: Handler) -> None:
    """Take the request and say nothing."""
    handler.wait_for_go()


def breaks_off(*words: str) -> Act:
    """Say some words, then the connection is gone."""

    def act(handler):
        handler.begin()
        for word in words:
            handler.word(word)
        handler.cut()

    return act


def ends_early(*words: str) -> Act:
    """Say some words, then end as if it were all, without a reason to finish."""

    def act(handler):
        handler.begin()
        for word in words:
            handler.word(word)
        handler.end()

    return act


def says_all_and(ends: Act) -> Act:
    """Say all there is to say, also that it is all, but not what it used; then something goes wrong."""

    def act(handler):
        handler.begin()
        handler.word("Hello ")
        handler.word("there.", finish_reason="stop")
        ends(handler)

    return act


def answers_in_part(status: int, ends: Act, **headers: str) -> Act:
    """Begin an answer of a gigabyte, all in one line."""

    def act(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "1000000000")
        handler.end_headers()
        handler.wfile.write(b'data: {"error"')
        handler.wfile.flush()
        ends(handler)

    return act


def goes_on(handler: Handler) -> None:
    """Send the rest of it."""
    while True:
        handler.wfile.write(b" " * 65_536)


def streams(*events: object) -> Act:
    """Send these as events, as they are."""

    def act(handler):
        handler.begin()
        for event in events:
            handler.event(event)
        handler.end()

    return act


def trickles(handler: Handler) -> None:
    """Send comments for ever: it is alive, and never comes to an end."""
    handler.begin()
    handler.word("Well")
    for _ in range(1_000):
        handler.raw(b": still here\n\n")
        time.sleep(0.02)


class LlmServer(ThreadingHTTPServer):
    """`acts`: what is done, one a request; then it says "Hello there."."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.acts: list[Act] = []
        self.asked: list[Asked] = []
        self.may_go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> "LlmServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.may_go_on.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
