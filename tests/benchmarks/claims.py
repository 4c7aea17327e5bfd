"""What the specification claims in its section on key features, beside what is measured here.

Its figures are estimates of a system in Go; those that are ratios, and can be measured on one machine, are here.
"""

import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import NewTopic

from tests.benchmarks.bench import Bench, cpu_seconds
from tests.benchmarks.relay import records_in_memory
from tests.benchmarks.report import Row, median_and_spread, number
from tests.benchmarks.size import as_dict, json_bytes

DOMAIN_TOPICS = ("conversation.events", "document.events", "identity.events")
FORMATS = ("json", "protobuf", "protobuf+snappy")
BATCH = 100
BATCHES_TIMED = 200


def run(bench: Bench) -> list[Row]:
    scale = bench.scale
    topics = [f"bench.{name}" for name in (*FORMATS, "own", "mixed")]
    topics = [topic.replace("+", "-") for topic in topics]
    admin = bench.admin()
    for future in admin.create_topics([NewTopic(topic, num_partitions=6) for topic in topics]).values():
        future.result(timeout=30)
    assert bench.services.kafka.process
    with bench.database() as outbox:
        outbox.seed(scale.traffic_events)
        speeds = bench.call(time_formats, url=outbox.url, rounds=scale.rounds)
        published = bench.call(
            publish_formats,
            url=outbox.url,
            topics=topics[:3],
            rounds=scale.rounds,
            log_dir=str(bench.services.kafka.data_dir / "log"),
            broker=bench.services.kafka.process.pid,
        )
        batches = bench.call(
            publish_batches,
            url=outbox.url,
            topic=topics[1],
            rounds=scale.rounds,
            count=scale.few_events,
            broker=bench.services.kafka.process.pid,
        )
        routed = bench.call(
            read_routed, url=outbox.url, own_topic=topics[3], mixed_topic=topics[4], rounds=scale.rounds
        )
    parallel = _partitions(bench, DOMAIN_TOPICS) / _partitions(bench, DOMAIN_TOPICS[:1])
    return [*_of_formats(speeds), *_of_publishing(published), *_of_batches(batches), *_of_routing(routed, parallel)]


def _of_formats(speeds: dict[str, Any]) -> list[Row]:
    serialise, serialise_spread = median_and_spread([json_ / pb for json_, pb in speeds["serialise"]])
    build, build_spread = median_and_spread([json_ / pb for json_, pb in speeds["build and serialise"]])
    parse, parse_spread = median_and_spread([json_ / pb for json_, pb in speeds["parse"]])
    json_mean, protobuf_mean = speeds["bytes"]
    return [
        Row(
            measure="Protobuf against JSON: smaller",
            value=(1 - protobuf_mean / json_mean) * 100,
            unit="%",
            claim=(30, 40),
            detail=f"realistic conversation traffic, {number(protobuf_mean)} for {number(json_mean)} bytes: most of an "
            "event is text and ids, which are the same bytes in both",
        ),
        Row(
            measure="an event of 2,048 bytes of JSON, as Protobuf",
            value=speeds["of 2048"],
            unit="bytes",
            claim=(None, 1229),
            detail="a message whose text makes the event that long",
        ),
        Row(
            measure="Protobuf against JSON: faster to serialise",
            value=serialise,
            unit="x",
            claim=(3, 5),
            detail=f"{serialise_spread}; {_us(speeds, 'serialise')}; a finished message against json.dumps() of a dict",
        ),
        Row(
            measure="Protobuf against JSON: faster to build and serialise",
            value=build,
            unit="x",
            claim=(3, 5),
            detail=f"{build_spread}; {_us(speeds, 'build and serialise')}; from the values of the fields",
        ),
        Row(
            measure="Protobuf against JSON: faster to parse",
            value=parse,
            unit="x",
            claim=(4, 6),
            detail=f"{parse_spread}; {_us(speeds, 'parse')}; envelope and payload against json.loads()",
        ),
    ]


def _us(speeds: dict[str, Any], what: str) -> str:
    json_, protobuf = (statistics.median(pair[i] for pair in speeds[what]) * 1e6 for i in range(2))
    return f"{protobuf:.2f} µs for {json_:.2f} µs"


def _of_publishing(published: dict[str, Any]) -> list[Row]:
    def of(kind: str, what: str) -> float:
        return statistics.median(figures[what] for figures in published[kind])

    def saved(kind: str, than: str, what: str) -> float:
        return (1 - of(kind, what) / of(than, what)) * 100

    def bytes_of(kind: str, than: str, what: str) -> str:
        return (
            f"{number(of(kind, what))} for {number(of(than, what))} bytes an event, with key, headers and batch header"
        )

    cpu = [
        (snappy["cpu"] / plain["cpu"] - 1) * 100
        for snappy, plain in zip(published["protobuf+snappy"], published["protobuf"], strict=True)
    ]
    cpu_more, cpu_spread = median_and_spread(cpu)
    later_ms, later_spread = median_and_spread(published["later_ms"])
    return [
        Row(
            measure="Protobuf against JSON: less storage in Kafka",
            value=saved("protobuf", "json", "disk"),
            unit="%",
            claim=(35, None),
            detail=f"neither compressed; {bytes_of('protobuf', 'json', 'disk')}",
        ),
        Row(
            measure="Protobuf against JSON: less network",
            value=saved("protobuf", "json", "network"),
            unit="%",
            claim=(30, None),
            detail=f"neither compressed; {bytes_of('protobuf', 'json', 'network')}",
        ),
        Row(
            measure="Snappy: compressed size of Protobuf",
            value=100 - saved("protobuf+snappy", "protobuf", "disk"),
            unit="%",
            claim=(60, 50),
            detail=f"in batches of 500; {bytes_of('protobuf+snappy', 'protobuf', 'disk')}",
        ),
        Row(
            measure="Snappy: less disk in Kafka",
            value=saved("protobuf+snappy", "protobuf", "disk"),
            unit="%",
            claim=(50, None),
        ),
        Row(
            measure="Snappy: less network",
            value=saved("protobuf+snappy", "protobuf", "network"),
            unit="%",
            claim=(55, None),
            detail=bytes_of("protobuf+snappy", "protobuf", "network"),
        ),
        Row(
            measure="Snappy: more CPU",
            value=cpu_more,
            unit="%",
            claim=(None, 5),
            detail=f"{cpu_spread}; producer and broker together, "
            f"{of('protobuf+snappy', 'cpu') * 1e6:.1f} for {of('protobuf', 'cpu') * 1e6:.1f} µs an event: at 1,000 "
            f"events/s {(of('protobuf+snappy', 'cpu') - of('protobuf', 'cpu')) * 1e5:.2f} % of a core",
        ),
        Row(
            measure="Snappy: later acknowledgement",
            value=later_ms,
            unit="ms",
            claim=(None, 0.5),
            detail=f"{later_spread}; batches of {BATCH} events, each run the median of {BATCHES_TIMED}",
        ),
    ]


def _of_batches(batches: dict[str, Any]) -> list[Row]:
    single, batched = batches["single"], batches["batched"]

    def ratio(what: str) -> tuple[float, str]:
        return median_and_spread([many[what] / one[what] for one, many in zip(single, batched, strict=True)])

    faster, faster_spread = median_and_spread(
        [one["seconds"] / many["seconds"] for one, many in zip(single, batched, strict=True)]
    )
    requests, _ = ratio("requests")
    broker, broker_spread = ratio("broker_cpu")
    single_ms = statistics.median(one["seconds"] for one in single) * 1e3
    batched_ms = statistics.median(many["seconds"] for many in batched) * 1e3
    return [
        Row(
            measure=f"batches of {BATCH} against single events: throughput",
            value=faster,
            unit="x",
            claim=(5, 10),
            detail=f"{faster_spread}; a bare producer that waits for the acknowledgement of each, or of each {BATCH}",
        ),
        Row(
            measure=f"batches of {BATCH}: events/s",
            value=1e3 / batched_ms,
            unit="events/s",
            claim=(2000, None),
            detail=f"single events: {number(1e3 / single_ms)} (the claim: 300)",
        ),
        Row(
            measure=f"batches of {BATCH}: time of an event",
            value=batched_ms,
            unit="ms",
            claim=(None, 1),
            detail=f"single events: {single_ms:.2f} ms (the claim: 3 ms)",
        ),
        Row(
            measure=f"batches of {BATCH}: fewer round trips",
            value=(1 - requests) * 100,
            unit="%",
            claim=(90, None),
            detail=f"{statistics.median(many['requests'] for many in batched) * BATCH:.1f} produce requests for "
            f"{BATCH} events: one a partition",
        ),
        Row(
            measure=f"batches of {BATCH}: less CPU of the broker",
            value=(1 - broker) * 100,
            unit="%",
            claim=(30, None),
            detail=f"{broker_spread} of what single events take",
        ),
    ]


def _of_routing(routed: list[tuple[float, float]], parallel: float) -> list[Row]:
    less, spread = median_and_spread([(1 - own / mixed) * 100 for own, mixed in routed])
    return [
        Row(
            measure="routing to three topics: more consumers can work at once",
            value=parallel,
            unit="x",
            claim=(3, None),
            detail="partitions of the three domain topics against those of one: a count, not a measurement",
        ),
        Row(
            measure="routing to three topics: less time to read one domain's events",
            value=less,
            unit="%",
            claim=(60, None),
            detail=f"{spread}; from a topic of its own, against one that three domains share equally and that is "
            "filtered by the header event_type",
        ),
    ]


def _partitions(bench: Bench, topics: tuple[str, ...]) -> int:
    return len(bench.ends(topics))


# Jobs


def time_formats(rounds: int) -> dict[str, Any]:
    """Job: seconds an event takes to be written and read as JSON and as Protobuf, for each round; and its bytes."""
    from events_outbox.catalog import event_type_for
    from events_outbox.proto.base_event_pb2 import BaseEvent
    from voicehelper.proto.conversation_pb2 import MessageSentPayload

    values = [value for _, _, value, _ in records_in_memory("id <= %s", 2_000)]
    dicts = [as_dict(value) for value in values]
    events = [BaseEvent.FromString(value) for value in values]
    texts = [json.dumps(plain, ensure_ascii=False, separators=(",", ":")) for plain in dicts]
    payloads = [event_type_for(event.event_type, event.event_version).payload for event in events]
    times = [event.timestamp.ToDatetime(UTC) for event in events]
    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # once: what dumps() makes at each call

    def build(plain: dict[str, Any], payload: Any, at: datetime) -> bytes:
        event = BaseEvent(**{name: value for name, value in plain.items() if name not in ("timestamp", "payload")})
        event.timestamp.FromDatetime(at)
        event.payload.Pack(payload(**plain["payload"]))
        return event.SerializeToString(deterministic=True)

    def build_json(plain: dict[str, Any], at: datetime) -> bytes:
        return encoder.encode({**plain, "timestamp": at.isoformat(), "payload": {**plain["payload"]}}).encode()

    def parse(value: bytes, payload: Any) -> Any:
        event = BaseEvent.FromString(value)
        return event, payload.FromString(event.payload.value)

    kinds: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "serialise": (
            lambda: [encoder.encode(plain).encode() for plain in dicts],
            lambda: [event.SerializeToString(deterministic=True) for event in events],
        ),
        "build and serialise": (
            lambda: [build_json(plain, at) for plain, at in zip(dicts, times, strict=True)],
            lambda: [build(*parts) for parts in zip(dicts, payloads, times, strict=True)],
        ),
        "parse": (
            lambda: [json.loads(text) for text in texts],
            lambda: [parse(value, payload) for value, payload in zip(values, payloads, strict=True)],
        ),
    }
    result: dict[str, Any] = {
        name: [[_best(json_) / len(values), _best(protobuf) / len(values)] for _ in range(rounds)]
        for name, (json_, protobuf) in kinds.items()
    }
    result["bytes"] = [sum(map(json_bytes, values)) / len(values), sum(map(len, values)) / len(values)]

    message = MessageSentPayload()
    longest = max(events, key=lambda event: event.ByteSize())
    longest.payload.Unpack(message)
    words = message.content
    while json_bytes(longest.SerializeToString()) < 2048:
        missing = 2048 - json_bytes(longest.SerializeToString())
        message.content += (" " + words)[:missing]
        longest.payload.Pack(message)
    result["of 2048"] = longest.ByteSize()
    return result


def _best(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of some runs: the others were disturbed."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(once() for _ in range(times))


class _Counting:
    """A producer, ready to go, and what librdkafka says of its traffic."""

    def __init__(self, **settings: Any) -> None:
        from events_outbox.kafka import producer_settings

        self.counted: dict[str, Any] = {}
        self.producer = Producer(
            {**producer_settings(), "statistics.interval.ms": 100, "stats_cb": self._on_stats, **settings}
        )

    def _on_stats(self, text: str) -> None:
        self.counted = json.loads(text)

    def traffic(self) -> tuple[int, int]:
        """Bytes sent, and produce requests, until now."""
        self.counted = {}
        deadline = time.monotonic() + 10
        while not self.counted and time.monotonic() < deadline:
            self.producer.poll(0.1)
        requests = sum(broker["req"].get("Produce", 0) for broker in self.counted["brokers"].values())
        return self.counted["tx_bytes"], requests

    def publish(self, records: list[Any], topic: str, batch: int) -> None:
        for start in range(0, len(records), batch):
            for _, key, value, headers in records[start : start + batch]:
                self.producer.produce(topic, value, key, headers=headers)
            self.producer.flush()


def publish_formats(topics: list[str], rounds: int, log_dir: str, broker: int) -> dict[str, Any]:
    """Job: bytes and CPU of the same events as JSON, as Protobuf and as compressed Protobuf, for each round."""
    protobuf = records_in_memory("true")
    as_json = [
        (topic, key, json.dumps(as_dict(value), ensure_ascii=False, separators=(",", ":")).encode(), headers)
        for topic, key, value, headers in protobuf
    ]
    broker_process = psutil.Process(broker)
    result: dict[str, Any] = {kind: [] for kind in FORMATS}
    for _ in range(rounds):
        for kind, topic in zip(FORMATS, topics, strict=True):
            producer = _Counting(**{"compression.type": "snappy" if kind.endswith("snappy") else "none"})
            records = as_json if kind == "json" else protobuf
            producer.publish(records[:1], topic, 1)
            disk, (network, _) = _disk_bytes(log_dir, topic), producer.traffic()
            cpu = time.process_time() + cpu_seconds(broker_process)
            producer.publish(records, topic, 500)
            cpu = time.process_time() + cpu_seconds(broker_process) - cpu
            figures = {
                "disk": _disk_bytes(log_dir, topic) - disk,
                "network": producer.traffic()[0] - network,
                "cpu": cpu,
            }
            result[kind].append({name: figure / len(records) for name, figure in figures.items()})

    plain, snappy = (_Counting(**{"compression.type": name}) for name in ("none", "snappy"))
    result["later_ms"] = []
    for _ in range(rounds):
        took: dict[_Counting, list[float]] = {plain: [], snappy: []}
        for number_ in range(BATCHES_TIMED):
            records = protobuf[number_ * BATCH % len(protobuf) :][:BATCH]
            for producer in (plain, snappy) if number_ % 2 else (snappy, plain):
                started = time.perf_counter()
                producer.publish(records, topics[1], BATCH)
                took[producer].append(time.perf_counter() - started)
        result["later_ms"].append((statistics.median(took[snappy]) - statistics.median(took[plain])) * 1e3)
    return result


def _disk_bytes(log_dir: str, topic: str) -> int:
    return sum(file.stat().st_size for file in Path(log_dir).glob(f"{topic}-[0-9]/*.log"))


def publish_batches(topic: str, rounds: int, count: int, broker: int) -> dict[str, Any]:
    """Job: seconds, requests and the broker's CPU seconds an event, one by one and in batches, for each round."""
    records = records_in_memory("id <= %s", max(count, 20 * BATCH) * 10)
    broker_process = psutil.Process(broker)
    result: dict[str, list[dict[str, float]]] = {"single": [], "batched": []}
    producer = _Counting()
    producer.publish(records[:100], topic, 1)
    for _ in range(rounds):
        # Ten times as many in batches: they are over soon, and the broker's CPU is counted in hundredths of a second.
        for kind, batch, these in (("single", 1, records[:count]), ("batched", BATCH, records[: count * 10])):
            _, requests = producer.traffic()
            started, cpu = time.perf_counter(), cpu_seconds(broker_process)
            producer.publish(these, topic, batch)
            seconds, cpu = time.perf_counter() - started, cpu_seconds(broker_process) - cpu
            figures = {"seconds": seconds, "requests": producer.traffic()[1] - requests, "broker_cpu": cpu}
            result[kind].append({name: figure / len(these) for name, figure in figures.items()})
    return result


def read_routed(own_topic: str, mixed_topic: str, rounds: int) -> list[tuple[float, float]]:
    """Job: seconds to read a third of the events from a topic of their own, and out of a mixed one, for each round."""
    from events_outbox.kafka import producer_settings
    from events_outbox.proto.base_event_pb2 import BaseEvent

    records = records_in_memory("true")
    wanted = records[::3]
    producer = _Counting()
    producer.publish(wanted, own_topic, 500)
    mixed = [
        (topic, key, value, headers if place % 3 == 0 else [("event_type", b"document.uploaded"), *headers[1:]])
        for place, (topic, key, value, headers) in enumerate(records)
    ]
    producer.publish(mixed, mixed_topic, 500)
    servers = producer_settings()["bootstrap.servers"]

    def read(topic: str) -> float:
        consumer = Consumer({"bootstrap.servers": servers, "group.id": "bench", "enable.auto.commit": False})
        consumer.list_topics(topic, timeout=30)  # connected
        started = time.perf_counter()
        consumer.assign([TopicPartition(topic, partition, 0) for partition in range(6)])
        got = 0
        while got < len(wanted):
            first = consumer.poll(10)
            if first is None:
                raise RuntimeError(f"{got} of {len(wanted)} records came")
            # Not consume(500, 10): it would wait for 500 of them.
            for record in [first, *consumer.consume(499, 0)]:
                if dict(record.headers())["event_type"].startswith(b"conversation."):
                    BaseEvent.FromString(record.value())
                    got += 1
        seconds = time.perf_counter() - started
        consumer.close()
        return seconds

    return [(read(own_topic), read(mixed_topic)) for _ in range(rounds)]
