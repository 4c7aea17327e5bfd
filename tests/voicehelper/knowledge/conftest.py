"""A Milvus of the tests' own, and an embedding endpoint."""

import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.services import free_ports
from voicehelper.devstack.milvus import MilvusLite
from voicehelper.knowledge.embedding import HashedNgrams
from voicehelper.knowledge.models import Document
from voicehelper.knowledge.services import upload_document
from voicehelper.knowledge.vectors import VectorsUnavailable, vector_store

_number = itertools.count()


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory) -> Iterator[MilvusLite]:
    """Milvus Lite as `make up` runs it. A test that stops or pauses it uses `milvus`, which brings it back."""
    directory = tmp_path_factory.mktemp("milvus")
    with (directory / "milvus.log").open("ab") as log:
        server = MilvusLite(directory / "data", free_ports(1)[0], output=log.fileno())
        server.start()
        server.wait_until_ready()
        yield server
        server.stop()


@pytest.fixture
def change(settings) -> Callable[..., None]:
    """Change settings of the domain for a test."""

    def change(**values: object) -> None:
        settings.KNOWLEDGE = replace(settings.KNOWLEDGE, **values)

    return change


@pytest.fixture
def milvus(milvus_server, change) -> Iterator[MilvusLite]:
    """The running Milvus, in which the test has collections of its own."""
    change(milvus_uri=milvus_server.uri, collection=f"test_{next(_number)}")
    # Of a test, not of production: the machine has much else to do.
    change(search_timeout_seconds=20.0)
    yield milvus_server
    milvus_server.resume()
    bring_back(milvus_server)
    vector_store().close()


def bring_back(server: MilvusLite) -> None:
    """Start it, unless it runs, and wait until a client gets through: gRPC waits a while between two attempts."""
    if not server.is_running():
        server.start()
        server.wait_until_ready()
        eventually(_gets_through, "a client gets through")


def _gets_through() -> bool:
    vector_store().close()
    try:
        vector_store().remove(uuid.uuid4())
    except VectorsUnavailable:
        return False
    return True


@pytest.fixture
def upload(milvus) -> Callable[..., Document]:
    """Upload a text, without indexing it."""

    def upload(user, text: str | bytes = "Elephants are large animals.", **fields) -> Document:
        data = text.encode() if isinstance(text, str) else text
        return upload_document(user=user, data=data, **{"file_name": "notes.txt", **fields})

    return upload


class EmbeddingEndpoint:
    """Answers `POST /v1/embeddings` as OpenAI's does, with vectors of the built-in embedder.

    `fails_with`: the status of an error instead, `answers_with`: other JSON instead. `dimension`: of its vectors.
    `gate`: a request waits for it, and then for `seconds`.
    `requests`: the texts of each request, and `keys` what it was authorised with.
    """

    model, dimension = "small-model", 32

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.keys: list[str] = []
        self.fails_with: int | None = None
        self.answers_with: object = None
        self.seconds = 0.0
        self.gate = threading.Event()
        self.gate.set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body["input"])
                endpoint.keys.append(self.headers["Authorization"])
                endpoint.gate.wait(20)
                time.sleep(endpoint.seconds)
                status, answer = endpoint._answer(body["input"])
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def _answer(self, texts: list[str]) -> tuple[int, dict]:
        if self.fails_with:
            return self.fails_with, {"error": {"message": f"no: {texts[0]}"}}
        if self.answers_with is not None:
            return 200, self.answers_with
        vectors = HashedNgrams(self.dimension).embed(texts)
        # Not in order, and not of length 1: neither is promised.
        data = [
            {"object": "embedding", "index": at, "embedding": [3 * x for x in vector]}
            for at, vector in enumerate(vectors)
        ]
        return 200, {"object": "list", "data": data[::-1], "usage": {"prompt_tokens": 7, "total_tokens": 7}}


@pytest.fixture
def endpoint(change) -> Iterator[EmbeddingEndpoint]:
    """An embedding endpoint, which the settings name."""
    endpoint = EmbeddingEndpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.05,))
    thread.start()
    change(
        embedding_base_url=endpoint.url,
        embedding_model=endpoint.model,
        embedding_api_key="secret-key",
        embedding_dimension=endpoint.dimension,
        embedding_batch_size=2,
    )
    yield endpoint
    endpoint.gate.set()
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


def eventually(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
