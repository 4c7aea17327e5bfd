"""A mail server and a webhook's receiver: real ones, on loopback, that misbehave on demand."""

import base64
import email
import email.policy
import hashlib
import hmac
import http.server
import json
import socketserver
import threading
from contextlib import suppress


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients are killed and give up here


class Running:
    """Serves in a thread until `close()`; what it holds back is let go then."""

    def __init__(self, handler):
        self.released = threading.Event()
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.owner = self
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class MailServer(Running):
    """SMTP. `answers`: what it says instead of yes, by command, "." being the end of a mail.

    An answer of "hang" keeps the client waiting, one of "wait" until `released` and then says yes, one of "drop" ends
    the connection; after "." the mail is kept.
    """

    def __init__(self):
        self.answers = {}
        self.mails = []
        self.recipients = []
        self.reached = threading.Event()
        super().__init__(_Smtp)


class _Smtp(socketserver.StreamRequestHandler):
    def handle(self):
        self.owner = self.server.owner
        if not self._answer("greeting", "220 test"):
            return
        for line in self.rfile:
            command = line.decode().strip().partition(" ")[0].upper()
            if command == "EHLO":
                done = self._answer(command, "250-test\r\n250 8BITMIME")
            elif command == "DATA":
                done = self._take_mail()
            elif command == "QUIT":
                self._answer(command, "221 bye")
                return
            else:
                if command == "RCPT":
                    self.owner.recipients.append(line.decode().partition("<")[2].partition(">")[0])
                done = self._answer(command, "250 ok")
            if not done:
                return

    def _take_mail(self):
        said = self.owner.answers.get("DATA")
        if not self._answer("DATA", "354 go on"):
            return False
        if said:
            return True
        lines = []
        for line in self.rfile:
            if line == b".\r\n":
                break
            lines.append(line)
        self.owner.mails.append(email.message_from_bytes(b"".join(lines), policy=email.policy.default))
        return self._answer(".", "250 taken")

    def _answer(self, command, usual):
        answer = self.owner.answers.get(command, usual)
        self.owner.reached.set()
        if answer == "wait":
            answer = usual
            self.owner.released.wait(60)
        if answer in ("hang", "drop"):
            if answer == "hang":
                self.owner.released.wait(60)
            return False
        self.wfile.write(answer.encode() + b"\r\n")
        return True


class Receiver(Running):
    """A webhook. It answers with `status`, `headers` and `body`; `hangs`: not at all, `drips`: a byte at a time."""

    def __init__(self):
        self.status = 204
        self.headers = {}
        self.body = b""
        self.hangs = self.drips = False
        self.requests = []
        self.reached = threading.Event()
        super().__init__(_Hook)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/hook?for=us"

    @property
    def data(self):
        return [json.loads(body) for _, body in self.requests]


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        owner = self.server.owner
        body = self.rfile.read(int(self.headers["Content-Length"]))
        owner.requests.append((self.headers, body))
        owner.reached.set()
        if owner.hangs:
            owner.released.wait(60)
            return
        with suppress(OSError):
            self.send_response(owner.status)
            for name, value in owner.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(owner.body)))
            self.end_headers()
            while owner.drips and not owner.released.wait(0.05):
                self.wfile.write(b"x")
            self.wfile.write(owner.body)

    def log_message(self, *arguments):
        pass


def is_signed(secret, headers, body):
    """Whether one of the signatures is the secret's: what a receiver does (Standard Webhooks)."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(base64.b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256).digest()
    expected = f"v1,{base64.b64encode(digest).decode()}"
    return expected in headers["webhook-signature"].split(" ")
