"""A process that records all that VoiceHelper itself does not do: `python -m tests.monitoring.record_everything PORT`.

Twice a second it asks models and caches, calls gRPC methods and searches, well and badly, until it is killed.
"""

import contextlib
import itertools
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import django
import grpc
from django.conf import settings
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from monitoring.worker import Worker

SETTINGS = {
    "INSTALLED_APPS": ["monitoring"],
    "LOGGING_CONFIG": None,
    "CACHES": {"default": {"BACKEND": "monitoring.caches.LocMemCache"}},
    "MONITORING": {"LLM_PRICES": {"large": {"input": 2.5, "output": 10.0}}},
}


def ask_a_model(is_bad):
    from monitoring.llm import llm_request

    for model in ("large", "unheard-of"):
        with contextlib.suppress(ConnectionError), llm_request(model=model, provider="openai") as request:
            request.used(input_tokens=200, output_tokens=50)
            if is_bad:
                raise ConnectionError("the provider has gone")


def look_into_the_cache(is_bad):
    from django.core.cache import cache

    cache.set("there", 1)
    cache.get("there")
    cache.get("not there")
    if is_bad:
        with contextlib.suppress(TypeError):
            cache.incr("there", "one")


class GrpcServer:
    """A server with one method, and a client of it."""

    def __init__(self):
        from monitoring.grpc import MonitoringInterceptor

        self.server = grpc.server(ThreadPoolExecutor(1), interceptors=[MonitoringInterceptor()])
        handlers = {"Generate": grpc.unary_unary_rpc_method_handler(self.generate)}
        self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("ai.V1", handlers)])
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def generate(self, request, context):
        if request == b"bad":
            context.abort(grpc.StatusCode.INTERNAL, "it does not work")
        return b"answer"

    def call(self, is_bad):
        with contextlib.suppress(grpc.RpcError):
            self.channel.unary_unary("/ai.V1/Generate")(b"bad" if is_bad else b"good", timeout=10)


class Vectors:
    """A Milvus with one collection."""

    def __init__(self, directory):
        from monitoring.milvus import observe_milvus

        self.client = observe_milvus(MilvusClient(f"{directory}/milvus.db"))
        self.client.create_collection("documents", dimension=4)
        self.client.insert("documents", [{"id": number, "vector": [number, 1, 2, 3]} for number in range(20)])

    def search(self, is_bad):
        with contextlib.suppress(MilvusException):
            self.client.search("documents", data=[[1, 1, 2, 3]], limit=-1 if is_bad else 10)


def main(port):
    settings.configure(**SETTINGS)
    django.setup()
    with tempfile.TemporaryDirectory() as directory, Worker("ai", port) as worker:
        grpc_server, vectors = GrpcServer(), Vectors(directory)
        for number in itertools.count():
            for record in (ask_a_model, look_into_the_cache, grpc_server.call, vectors.search):
                record(number % 4 == 3)
            worker.tick()
            time.sleep(0.5)


if __name__ == "__main__":
    main(int(sys.argv[1]))
