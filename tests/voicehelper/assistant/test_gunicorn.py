"""A streamed reply as it is served: gunicorn with its threads, a client over TCP, a provider that takes its time."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import httpx
import psycopg
import pytest
from django.db import connection

from tests.monitoring.conftest import answers, free_port, get, sample, wait_until
from voicehelper.conversations.models import Conversation, Message
from voicehelper.conversations.services import create_conversation, send_message
from voicehelper.identity.models import ApiToken
from voicehelper.services import BASE_DIR

from .events import events
from .llm_server import hangs, says, says_and_waits

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def database_url(db):
    return os.environ["DATABASE_URL"].rpartition("/")[0] + f"/{connection.settings_dict['NAME']}"


@pytest.fixture
def gunicorn(tmp_path, server, database_url):
    """The web server and its address: one worker, two threads."""
    port = free_port()
    environment = {
        **os.environ,
        "DATABASE_URL": database_url,
        "DATABASE_CONN_MAX_AGE_SECONDS": "0",
        "VOICEHELPER_DATA_DIR": str(tmp_path),
        "WEB_PORT": str(port),
        "WEB_CONCURRENCY": "1",
        "WEB_THREADS": "2",
        "WEB_SEND_TIMEOUT_SECONDS": "2",
        "LLM_BASE_URL": server.url,
        "LLM_SIMPLE_MODEL": "gpt-4o-mini",
        "LLM_MAX_ATTEMPTS": "1",
        "LLM_MAX_REPLIES": "1",
        "LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "gunicorn", "-c", "voicehelper/gunicorn.conf.py"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=BASE_DIR, env=environment, stdout=log, stderr=log)
    with process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(f"{address}/livez") or process.poll() is not None, seconds=60)
            assert process.poll() is None, (tmp_path / "log").read_text()
            yield process, address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def web(gunicorn):
    return gunicorn[1]


@contextmanager
def replying(web, user, conversation):
    headers = {"Authorization": f"Token {ApiToken.objects.issue(user=user, name='test').text}"}
    url = f"{web}/api/v1/conversations/{conversation.id}/replies"
    with httpx.stream("POST", url, headers=headers, timeout=20) as response:
        yield response


def test_the_first_word_is_there_before_the_last_is_said(web, server, bob, conversation, database_url):
    server.acts = [says_and_waits("On ", then=("Friday.",))]
    with replying(web, bob, conversation) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        got = (one for one in events(response.iter_lines()) if one[0] != ":")
        assert next(got) == ("token", {"text": "On "})
        assert not server.may_go_on.is_set()
        with psycopg.connect(database_url) as session:
            states = session.execute(
                "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        assert states and {state for (state,) in states} == {"idle"}  # no transaction is open
        server.may_go_on.set()
        assert next(got) == ("token", {"text": "Friday."})
        name, message = next(got)
        assert (name, message["content"]) == ("message", "On Friday.")
        assert list(got) == []
    text = get(f"{web}/metrics").text
    assert sample(text, "llm_tokens_used_total", model="gpt-4o-mini", token_type="output") == 30
    path = "/api/v1/conversations/<uuid:pk>/replies"
    wait_until(lambda: sample(get(f"{web}/metrics").text, "http_requests_total", path=path, status="200") == 1)


@pytest.mark.parametrize("act", [says_and_waits("On "), hangs])
def test_a_client_that_goes_away_is_noticed(web, server, bob, conversation, act):
    server.acts = [act, says("Hello")]
    with replying(web, bob, conversation) as response:
        next(response.iter_bytes())
        wait_until(lambda: server.asked)
    assert server.asked[0].gone.wait(10)
    wait_until(lambda: Conversation.objects.get().reply_id is None)
    with replying(web, bob, conversation) as response:
        assert [name for name, _ in events(response.iter_lines()) if name != ":"] == ["token", "message"]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has the option")
def test_clients_that_do_not_read_keep_no_threads(web, bob, conversation):
    """Two of them have both threads, until the server gives them up."""
    about = {"conversation": conversation, "tenant_id": bob.tenant_id, "user": bob, "content": "\U0001f44b" * 32_000}
    Message.objects.bulk_create(Message(position=number, **about) for number in range(2, 51))  # some 6 MB
    token = ApiToken.objects.issue(user=bob, name="test").text
    path = f"/api/v1/conversations/{conversation.id}/messages"
    address = ("127.0.0.1", int(web.rpartition(":")[2]))
    with ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Token {token}\r\n\r\n".encode())
        wait_until(lambda: not is_quick(web))
        wait_until(lambda: is_quick(web))


def is_quick(web):
    try:
        return httpx.get(f"{web}/livez", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def test_a_provider_that_hangs_leaves_threads_for_others(web, server, bob, conversation):
    server.acts = [hangs]
    other = create_conversation(user=bob, title="Lunch")
    send_message(user=bob, conversation_id=other.id, content="When is it?")
    with replying(web, bob, conversation) as first, replying(web, bob, other) as second:
        assert (first.status_code, second.status_code) == (200, 503)
        wait_until(lambda: is_quick(web))


def test_a_server_that_is_stopped_lets_a_reply_end(gunicorn, server, bob, conversation):
    process, web = gunicorn
    server.acts = [says_and_waits("On ", then=("Friday.",))]
    with replying(web, bob, conversation) as response:
        got = (one for one in events(response.iter_lines()) if one[0] != ":")
        assert next(got) == ("token", {"text": "On "})
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_quick(web))  # it takes no further request
        server.may_go_on.set()
        assert [name for name, _ in got] == ["token", "message"]
    assert process.wait(20) == 0
    assert Conversation.objects.get().message_count == 2
