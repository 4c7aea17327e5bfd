"""LLM requests: recorded by hand, and by observed `openai` clients that talk to a real server of their protocol."""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from django.core.exceptions import ImproperlyConfigured
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from monitoring import context, labels, llm, openai_client
from monitoring.conf import MonitoringSettings
from monitoring.llm import llm_request, price_of, record_llm_usage
from monitoring.openai_client import observe_openai

from .conftest import counted, run_python

SECRET = "my account number is 4711"
MESSAGES = [{"role": "user", "content": SECRET}]
PRICES = {
    "gpt-4o": {"input": 2.5, "output": 10, "cached_input": 1.25},
    "gpt-4o-mini": {"input": 0.15, "output": 0.6},
}
_number = itertools.count()


@pytest.fixture(autouse=True)
def prices(settings, monkeypatch):
    settings.MONITORING = {**settings.MONITORING, "LLM_PRICES": PRICES}
    monkeypatch.setattr(labels, "_seen", {})


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(llm, "tracer", provider.get_tracer("test"))
    yield exporter.get_finished_spans
    provider.shutdown()


@pytest.fixture
def provider():
    """A name of its own for each test, so that its series begin at nothing."""
    return f"provider-{next(_number)}"


def tokens(provider):
    return [counted("llm_tokens_used_total", provider=provider, token_type=kind) for kind in ("input", "output")]


def cost(provider, **labels):
    return counted("llm_cost_dollars_total", provider=provider, **labels)


def requests(provider):
    """(requests, of which failed)"""
    names = ("llm_request_duration_seconds_count", "llm_request_errors_total")
    return [counted(name, provider=provider) for name in names]


# --- By hand ---


def test_usage_is_counted(provider):
    for tenant_id in ("alice's", "alice's", "bob's"):
        record_llm_usage(
            model="gpt-4o",
            provider=provider,
            input_tokens=100,
            output_tokens=20,
            cost_dollars=0.5,
            tenant_id=tenant_id,
        )
    assert tokens(provider) == [300, 60]
    assert (cost(provider, tenant_id="alice's"), cost(provider, tenant_id="bob's")) == (1.0, 0.5)
    assert requests(provider) == [0, 0]


def test_the_tenant_is_that_of_the_context(provider):
    token = context.tenant_id.set("charlie's")
    try:
        usage = {"input_tokens": 1, "output_tokens": 1, "cost_dollars": 0.25}
        record_llm_usage(model="gpt-4o", provider=provider, **usage)
    finally:
        context.tenant_id.reset(token)
    assert cost(provider, tenant_id="charlie's") == 0.25


def test_usage_that_cannot_be_counted_fails_nothing(provider, caplog):
    record_llm_usage(model="gpt-4o", provider=provider, input_tokens=-1, output_tokens=1, cost_dollars=1)
    assert "could not be recorded" in caplog.text


def test_a_request_is_timed_and_priced(provider, spans):
    with llm_request(model="gpt-4o-2024-08-06", provider=provider, server_address="llm", server_port=1) as request:
        assert trace.get_current_span() is request.span
        request.used(input_tokens=1_000_000, output_tokens=100_000, cached_input_tokens=400_000)
        request.answered(model="gpt-4o-2024-08-06", finish_reasons=["stop"])
    assert requests(provider) == [1, 0]
    assert tokens(provider) == [1_000_000, 100_000]
    assert cost(provider) == pytest.approx(0.6 * 2.5 + 0.4 * 1.25 + 0.1 * 10)
    [span] = spans()
    assert (span.name, span.kind, span.status.is_unset) == (
        "chat gpt-4o-2024-08-06",
        trace.SpanKind.CLIENT,
        True,
    )
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": "gpt-4o-2024-08-06",
        "gen_ai.response.model": "gpt-4o-2024-08-06",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 1_000_000,
        "gen_ai.usage.output_tokens": 100_000,
        "gen_ai.usage.cache_read.input_tokens": 400_000,
        "server.address": "llm",
        "server.port": 1,
    }


def test_a_cost_that_is_known_is_taken(provider):
    with llm_request(model="gpt-4o", provider=provider) as request:
        request.used(input_tokens=1, output_tokens=1, cost_dollars=7)
    assert cost(provider) == 7


def test_a_request_that_fails(provider, spans):
    with pytest.raises(ValueError, match=SECRET), llm_request(model="gpt-4o", provider=provider) as request:
        request.used(input_tokens=5)
        raise ValueError(SECRET)
    assert (requests(provider), tokens(provider)) == ([1, 1], [5, 0])
    [span] = spans()
    assert (span.status.status_code, span.attributes["error.type"]) == (trace.StatusCode.ERROR, "ValueError")
    assert SECRET not in span.to_json()


def test_a_request_that_was_ended_in_its_block_is_counted_once(provider):
    with llm_request(model="gpt-4o", provider=provider) as request:
        request.used(input_tokens=5)
        request.end()
    assert (requests(provider), tokens(provider)) == ([1, 0], [5, 0])


def test_errors_begin_at_0(provider):
    with llm_request(model="gpt-4o", provider=provider):
        samples = [one for family in llm.LLM_ERRORS.collect() for one in family.samples]
        assert [one.value for one in samples if one.labels["provider"] == provider] == [0]


def test_a_task_that_is_cancelled_is_no_error(provider):
    async def ask():
        with llm_request(model="gpt-4o", provider=provider):
            await asyncio.Event().wait()

    async def cancel():
        task = asyncio.create_task(ask())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert requests(provider) == [1, 0]


def test_a_model_without_price_is_counted_and_said_once(provider, caplog):
    model = f"unheard-of-{provider}"
    for _ in range(3):
        with llm_request(model=model, provider=provider) as request:
            request.used(input_tokens=1, output_tokens=1)
    assert (tokens(provider), cost(provider)) == ([3, 3], 0)
    assert counted("llm_requests_without_price_total", model=model, provider=provider) == 3
    [line] = [one for one in caplog.messages if "no price" in one]
    assert model in line


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o", "gpt-4o"),
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4o-latest", "gpt-4o"),
        ("gpt-4o-0613", "gpt-4o"),
        ("gpt-4o@20240806", "gpt-4o"),
        ("gpt-4o-mini", "gpt-4o-mini"),
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
        ("gpt-4o-audio-preview", None),
        ("gpt-4o1", None),
        ("gpt-4", None),
        ("", None),
    ],
)
def test_the_price_of_a_dated_model(model, name):
    assert price_of(model) == (PRICES[name] if name else None)


@pytest.mark.parametrize(
    "prices",
    [
        [],
        {"gpt-4o": 2.5},
        {"gpt-4o": {"input": 1}},
        {"gpt-4o": {"input": 1, "output": -1}},
        {"gpt-4o": {"input": 1, "output": "1"}},
        {"gpt-4o": {"input": 1, "output": float("nan")}},
        {"gpt-4o": {"input": 1, "output": 1, "outputs": 1}},
    ],
)
def test_prices_that_are_none(prices):
    with pytest.raises(ImproperlyConfigured, match="LLM_PRICES"):
        MonitoringSettings(llm_prices=prices)


def test_series_stay_bounded(provider):
    for number in range(2_000):
        with llm_request(model=f"{provider}-{number}", provider=provider):
            pass
    assert requests(provider)[0] == 2_000
    models = {
        one.labels["model"]
        for family in llm.LLM_ERRORS.collect()
        for one in family.samples
        if one.labels["provider"] == provider
    }
    assert len(models) <= 501
    for metric in (llm.LLM_ERRORS, llm.LLM_REQUEST_SECONDS):
        metric.clear()


def test_the_module_needs_no_openai():
    done = run_python(
        "import sys, django; django.setup(); import monitoring.openai_client; assert 'openai' not in sys.modules"
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- The client of `openai` ---


class Handler(BaseHTTPRequestHandler):
    """Does what the test has queued, one item a request: (status, body), or the chunks of a stream."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append((self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0)
        if isinstance(answer, list):
            self.stream(answer, tells_usage=(body.get("stream_options") or {}).get("include_usage"))
            return
        status, content = answer
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def stream(self, chunks, tells_usage):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            if chunk is CUT:
                self.close_connection = True
                return
            if chunk is WAIT:
                self.server.may_go_on.wait(20)
                continue
            if chunk is END:
                break
            if isinstance(chunk, dict) and chunk.get("usage") and not chunk["choices"] and not tells_usage:
                continue
            self.event(json.dumps(chunk))
        else:
            self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data):
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.flush()

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_):
        pass


CUT, END, WAIT = "cut", "end", "wait"


class Provider(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.got = [], []
        self.may_go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()


@pytest.fixture(scope="module")
def running():
    with Provider() as server:
        yield server
        server.shutdown()
        server.thread.join()


@pytest.fixture
def server(running):
    running.answers.clear()
    running.got.clear()
    running.may_go_on.clear()
    yield running
    running.may_go_on.set()
    assert running.answers == []


USAGE = {"prompt_tokens": 1_000, "completion_tokens": 200, "total_tokens": 1_200}
COST = (1_000 * 2.5 + 200 * 10) / 1_000_000


def completion(**fields):
    message = {"role": "assistant", "content": SECRET}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": USAGE,
        **fields,
    }


def chunk(content=None, *, finish_reason=None, **fields):
    delta = {"content": content} if content else {}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
        **fields,
    }


USAGE_CHUNK = chunk(choices=[], usage=USAGE)
STREAM = [chunk("my "), chunk("account"), chunk(finish_reason="stop"), USAGE_CHUNK]


class Sync:
    """What a caller does, with a client of either kind."""

    def __init__(self, url):
        self.original = openai.OpenAI(base_url=url, api_key="-", max_retries=2)

    def observe(self, provider, **options):
        self.client = self.original.with_options()  # another client, of the same connections
        assert observe_openai(self.client, provider=provider, **options) is self.client
        return self

    def close(self):
        self.original.close()

    def ask(self, **arguments):
        return self.client.chat.completions.create(messages=MESSAGES, **{"model": "gpt-4o", **arguments})

    def read(self, count=None, **arguments):
        """Read a stream, or `count` chunks of it and then close it."""
        stream = self.ask(stream=True, **arguments)
        if count is None:
            return list(stream)
        with stream as self.kept:  # a stream that is dropped ends, too
            return list(itertools.islice(stream, count))

    def drop(self, count, **arguments):
        stream = self.ask(stream=True, **arguments)
        for _ in range(count):
            next(stream)

    def read_raw(self):
        return self.client.chat.completions.with_raw_response.create(model="gpt-4o", messages=MESSAGES).parse()

    def read_through_helper(self, count=None):
        with self.client.chat.completions.stream(model="gpt-4o", messages=MESSAGES) as stream:
            self.kept = stream
            if count is None:
                return stream.get_final_completion()
            return list(itertools.islice(stream, count))

    def parse(self):
        return self.client.chat.completions.parse(model="gpt-4o", messages=MESSAGES)

    def embed(self):
        return self.client.embeddings.create(model="gpt-4o", input=[SECRET])


class Async(Sync):
    def __init__(self, url):
        self.runner = asyncio.Runner()
        self.original = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=2)

    def close(self):
        self.runner.run(self.original.close())
        self.runner.close()

    def run(self, coroutine):
        return self.runner.run(coroutine, context=contextvars.copy_context())

    async def _ask(self, **arguments):
        return await self.client.chat.completions.create(messages=MESSAGES, **{"model": "gpt-4o", **arguments})

    def ask(self, **arguments):
        return self.run(self._ask(**arguments))

    def read(self, count=None, **arguments):
        async def read():
            stream = await self._ask(stream=True, **arguments)
            if count is None:
                return [chunk async for chunk in stream]
            async with stream as self.kept:
                return [await anext(stream) for _ in range(count)]

        return self.run(read())

    def drop(self, count, **arguments):
        async def drop():
            stream = await self._ask(stream=True, **arguments)
            for _ in range(count):
                await anext(stream)

        self.run(drop())

    def read_raw(self):
        create = self.client.chat.completions.with_raw_response.create
        return self.run(create(model="gpt-4o", messages=MESSAGES)).parse()

    def read_through_helper(self, count=None):
        async def read():
            async with self.client.chat.completions.stream(model="gpt-4o", messages=MESSAGES) as stream:
                self.kept = stream
                if count is None:
                    return await stream.get_final_completion()
                return [await anext(stream) for _ in range(count)]

        return self.run(read())

    def parse(self):
        return self.run(self.client.chat.completions.parse(model="gpt-4o", messages=MESSAGES))

    def embed(self):
        return self.run(self.client.embeddings.create(model="gpt-4o", input=[SECRET]))


@pytest.fixture(scope="module")
def callers(running):
    with contextlib.closing(Sync(running.url)) as sync, contextlib.closing(Async(running.url)) as async_:
        yield {"sync": sync, "async": async_}


@pytest.fixture(params=["sync", "async"])
def caller(request, callers, server, provider):
    return callers[request.param].observe(provider)


@pytest.fixture
def sync_caller(callers, server, provider):
    return callers["sync"].observe(provider)


def test_a_chat_completion(caller, server, provider, spans, caplog):
    caplog.set_level(logging.INFO)
    server.answers = [(200, completion())]
    with llm.tracer.start_as_current_span("request") as parent:
        answer = caller.ask(max_tokens=50, temperature=0)
    assert answer.choices[0].message.content == SECRET
    assert (requests(provider), tokens(provider), cost(provider)) == ([1, 0], [1_000, 200], COST)
    [span, _] = spans()
    assert span.parent.span_id == parent.get_span_context().span_id
    assert (span.name, span.kind) == ("chat gpt-4o", trace.SpanKind.CLIENT)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0,
        "gen_ai.response.model": "gpt-4o-2024-08-06",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 1_000,
        "gen_ai.usage.output_tokens": 200,
        "server.address": "127.0.0.1",
        "server.port": server.server_port,
    }
    [(_, headers, body)] = server.got
    ids = span.get_span_context()
    assert headers["traceparent"].split("-")[1:3] == [f"{ids.trace_id:032x}", f"{ids.span_id:016x}"]
    assert "baggage" not in headers
    assert "stream_options" not in body
    assert SECRET not in span.to_json() + caplog.text


def test_a_deployment_is_priced_by_the_model_that_answers(caller, server, provider):
    server.answers = [(200, completion())]
    caller.ask(model="our-deployment")
    assert counted("llm_cost_dollars_total", provider=provider, model="our-deployment") == COST


def test_a_stream_counts_at_its_end_and_hides_the_usage_that_nobody_asked_for(caller, server, provider, spans):
    server.answers = [STREAM]
    chunks = caller.read()
    assert [one.choices[0].delta.content for one in chunks] == ["my ", "account", None]
    assert server.got[0][2]["stream_options"] == {"include_usage": True}
    assert (requests(provider), tokens(provider), cost(provider)) == ([1, 0], [1_000, 200], COST)
    [span] = spans()
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert span.attributes["gen_ai.response.model"] == "gpt-4o-2024-08-06"
    assert span.attributes["gen_ai.request.stream"] is True
    assert 0 < span.attributes["gen_ai.response.time_to_first_chunk"] < (span.end_time - span.start_time) / 1e9 + 1
    assert "account" not in span.to_json()


def test_a_stream_whose_usage_was_asked_for_is_left_as_it_is(caller, server, provider):
    server.answers = [STREAM]
    chunks = caller.read(stream_options={"include_usage": True})
    assert (len(chunks), chunks[-1].usage.total_tokens) == (4, 1_200)
    assert tokens(provider) == [1_000, 200]


@pytest.mark.parametrize(
    "arguments", [{"stream_options": {"include_usage": False}}, {"extra_body": {"stream_options": {}}}]
)
def test_a_stream_whose_usage_was_declined(caller, server, provider, arguments):
    server.answers = [STREAM]
    assert len(caller.read(**arguments)) == 3
    assert not server.got[0][2]["stream_options"].get("include_usage")
    assert (requests(provider), tokens(provider)) == ([1, 0], [0, 0])


def test_other_stream_options_are_kept(caller, server):
    server.answers = [STREAM]
    caller.read(stream_options={"include_obfuscation": False})
    assert server.got[0][2]["stream_options"] == {"include_obfuscation": False, "include_usage": True}


def test_a_provider_that_must_not_be_asked_for_usage(caller, server, provider):
    caller.observe(provider, ask_for_usage=False)
    server.answers = [STREAM]
    assert len(caller.read()) == 3
    assert "stream_options" not in server.got[0][2]
    assert requests(provider) == [1, 0]


def test_usage_on_the_last_chunk_with_content_is_counted_and_not_hidden(caller, server, provider):
    server.answers = [[chunk("my"), chunk(finish_reason="stop", usage=USAGE)]]
    assert len(caller.read()) == 2
    assert tokens(provider) == [1_000, 200]


def test_a_stream_is_timed_to_its_end(sync_caller, server, provider):
    server.answers = [[chunk("my"), WAIT, chunk(finish_reason="stop")]]
    stream = sync_caller.ask(stream=True)
    assert next(stream).choices[0].delta.content == "my"
    assert requests(provider) == [0, 0]
    server.may_go_on.set()
    assert len(list(stream)) == 1
    assert requests(provider) == [1, 0]


def test_a_stream_closed_early_is_no_error(caller, server, provider, spans):
    server.answers = [[chunk("my"), chunk("account"), WAIT]]
    assert len(caller.read(1)) == 1
    assert (requests(provider), tokens(provider)) == ([1, 0], [0, 0])
    [span] = spans()
    assert span.status.is_unset


@pytest.mark.parametrize("count", [0, 1])
def test_a_stream_that_is_dropped_is_counted(caller, server, provider, spans, count):
    server.answers = [[chunk("my"), chunk("account"), WAIT]]
    caller.drop(count)
    gc.collect()
    assert requests(provider) == [1, 0]
    assert len(spans()) == 1


def test_a_stream_that_breaks_midway(caller, server, provider, spans):
    server.answers = [[chunk("my"), CUT]]
    with pytest.raises(openai.APIConnectionError):
        caller.read()
    assert requests(provider) == [1, 1]
    [span] = spans()
    assert (span.status.status_code, span.attributes["error.type"]) == (
        trace.StatusCode.ERROR,
        "openai.APIConnectionError",
    )


def test_a_stream_that_ends_without_its_end_is_an_error(caller, server, provider, spans):
    server.answers = [[chunk("my"), END]]
    assert len(caller.read()) == 1
    assert requests(provider) == [1, 1]
    [span] = spans()
    assert span.attributes["error.type"] == "incomplete_stream"


def test_an_error_within_a_stream(caller, server, provider):
    server.answers = [[chunk("my"), {"error": {"message": SECRET}}]]
    with pytest.raises(openai.APIError):
        caller.read()
    assert requests(provider) == [1, 1]


def test_what_openai_tries_again_is_one_request(caller, server, provider, spans):
    server.answers = [(429, {"error": {"message": "slow down"}}), (429, {}), (200, completion())]
    caller.ask()
    assert (requests(provider), tokens(provider)) == ([1, 0], [1_000, 200])
    assert len({headers["traceparent"] for _, headers, _ in server.got}) == len(spans()) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [(429, openai.RateLimitError), (500, openai.InternalServerError), (400, openai.BadRequestError)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_refused(caller, server, provider, spans, status, error, stream):
    caller.client.max_retries = 0
    server.answers = [(status, {"error": {"message": SECRET}})]
    with pytest.raises(error):
        caller.ask(stream=stream)
    assert (requests(provider), tokens(provider)) == ([1, 1], [0, 0])
    [span] = spans()
    assert span.attributes["error.type"] == f"openai.{error.__name__}"
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}, "none"])
def test_a_provider_that_tells_no_usage(caller, server, provider, spans, usage):
    server.answers = [(200, completion(usage=usage))]
    caller.ask()
    assert (requests(provider), tokens(provider), cost(provider)) == ([1, 0], [0, 0], 0)
    [span] = spans()
    assert "gen_ai.usage.input_tokens" not in span.attributes


def test_cached_tokens_cost_less(caller, server, provider):
    server.answers = [(200, completion(usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 600}}))]
    caller.ask()
    assert cost(provider) == pytest.approx((400 * 2.5 + 600 * 1.25 + 200 * 10) / 1_000_000)


def test_the_tenant_of_a_stream_is_that_of_its_start(sync_caller, server, provider):
    server.answers = [STREAM]
    token = context.tenant_id.set("alice's")
    stream = sync_caller.ask(stream=True)
    context.tenant_id.reset(token)
    list(stream)
    assert cost(provider, tenant_id="alice's") == COST


def test_the_helpers_of_the_client_are_observed(caller, server, provider):
    server.answers = [STREAM, (200, completion()), (200, completion())]
    assert caller.read_through_helper().choices[0].message.content == "my account"
    assert caller.parse().choices[0].message.content == SECRET
    assert caller.read_raw().choices[0].message.content == SECRET
    assert (requests(provider), tokens(provider)) == ([3, 0], [3_000, 600])


def test_a_helper_that_is_left_early_ends_the_request(caller, server, provider):
    server.answers = [[chunk("my"), chunk("account"), WAIT]]
    caller.read_through_helper(1)
    assert requests(provider) == [1, 0]


def test_embeddings(caller, server, provider, spans):
    data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
    usage = {"prompt_tokens": 7, "total_tokens": 7}
    server.answers = [(200, {"object": "list", "model": "gpt-4o", "data": data, "usage": usage})]
    assert caller.embed().data[0].embedding == [0.5]
    assert (requests(provider), tokens(provider)) == ([1, 0], [7, 0])
    [span] = spans()
    assert (span.name, span.attributes["gen_ai.operation.name"]) == ("embeddings gpt-4o", "embeddings")


def test_the_model_that_answers_is_no_label(caller, server, provider):
    server.answers = [(200, completion(model=f"made-up-{number}")) for number in range(3)]
    for _ in range(3):
        caller.ask()
    assert counted("llm_request_duration_seconds_count", provider=provider, model="gpt-4o") == 3


def test_observing_twice_counts_once(caller, server, provider):
    observe_openai(caller.client, provider=provider)
    server.answers = [(200, completion())]
    caller.ask()
    assert requests(provider) == [1, 0]


def test_recording_that_fails_fails_nothing(caller, server, provider, monkeypatch, caplog):
    monkeypatch.setattr(openai_client, "_number", lambda value: 1 / 0)
    server.answers = [(200, completion()), STREAM]
    assert caller.ask().usage.total_tokens == 1_200
    assert len(caller.read()) == 3
    assert "could not be recorded" in caplog.text
    assert requests(provider) == [2, 0]
