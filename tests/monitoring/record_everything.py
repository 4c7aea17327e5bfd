"""A process that records all that VoiceHelper itself does not do: `python -m tests.monitoring.record_everything PORT`.

Twice a second it asks models and caches, calls gRPC methods, searches and queries, well and badly, until it is killed.
"""

import contextlib
import itertools
import sys
import time

import django
from django.conf import settings
from prometheus_client.registry import Collector

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


class ConversationCollector(Collector):
    def collect(self):
        from monitoring import metrics

        rate = metrics.CONVERSATION_SUCCESS_RATE()
        rate.add_metric(["chat", "acme"], 0.95)
        yield rate


# These write the series themselves, as their sources do.
def serve_grpc(is_bad):
    from monitoring import metrics

    metrics.GRPC_REQUESTS.labels("ai", "/ai.v1.AI/Generate", "ERROR" if is_bad else "OK").inc()
    metrics.GRPC_REQUEST_SECONDS.labels("ai", "/ai.v1.AI/Generate").observe(2 if is_bad else 0.02)


def search(is_bad):
    from monitoring import metrics

    metrics.MILVUS_SEARCH_SECONDS.labels("documents").observe(0.2 if is_bad else 0.02)
    metrics.MILVUS_SEARCH_RESULTS.labels("documents").observe(0 if is_bad else 10)
    metrics.MILVUS_ERRORS.labels("documents").inc(int(is_bad))


def query(is_bad):
    from monitoring import metrics

    labels = "ai", "SELECT", "documents"
    metrics.DB_QUERY_SECONDS.labels(*labels).observe(1 if is_bad else 0.002)
    metrics.DB_QUERY_ERRORS.labels(*labels).inc(int(is_bad))


def main(port):
    settings.configure(**SETTINGS)
    django.setup()
    from monitoring.metrics import register_collector

    register_collector(ConversationCollector())
    with Worker("ai", port) as worker:
        for number in itertools.count():
            for record in (ask_a_model, look_into_the_cache, serve_grpc, search, query):
                record(number % 4 == 3)
            worker.tick()
            time.sleep(0.5)


if __name__ == "__main__":
    main(int(sys.argv[1]))
