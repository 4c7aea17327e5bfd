"""A Kafka broker without Kafka: librdkafka's mock cluster, in a process of its own.

`python -m voicehelper.devstack.embedded_broker --port 9092 conversation.events document.events`

It speaks the real protocol (idempotent producers, consumer groups, offsets) to any client on this machine,
keeps everything in memory (about 5 MB or 100,000 records a partition) and forgets it on exit. It has no topic
admin and no replication. For a first run and for tests without Java; never for production.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import confluent_kafka

from voicehelper.devstack import DevstackError
from voicehelper.devstack.child import Child

PARTITIONS = 6
HOST = "127.0.0.1"
_PRODUCER = 0  # rd_kafka_type_t
_BROKER_ID = 1
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # result, arguments; a pointer cut to a C int would crash us
    "rd_kafka_conf_new": (c_void_p, []),
    "rd_kafka_conf_set": (c_int, [c_void_p, c_char_p, c_char_p, c_char_p, c_size_t]),
    "rd_kafka_new": (c_void_p, [c_int, c_void_p, c_char_p, c_size_t]),
    "rd_kafka_mock_cluster_new": (c_void_p, [c_void_p, c_int]),
    "rd_kafka_mock_cluster_bootstraps": (c_char_p, [c_void_p]),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [c_void_p, c_int32]),
    "rd_kafka_mock_topic_create": (c_int, [c_void_p, c_char_p, c_int, c_int]),
    "rd_kafka_mock_broker_set_host_port": (None, [c_void_p, c_int32, c_char_p, c_int]),
}


class EmbeddedBroker(Child):
    """The process. `start()` returns at once, `wait_until_ready()` when clients can connect."""

    kind = "embedded"

    def __init__(self, port: int, topics: Sequence[str], *, output: int) -> None:
        self.port = port
        self.bootstrap_servers = f"{HOST}:{port}"
        super().__init__(
            "kafka",
            [sys.executable, "-m", "voicehelper.devstack.embedded_broker", f"--port={port}", *topics],
            output=output,
            stop_seconds=5,
        )

    def wait_until_ready(self, timeout_seconds: float = 30) -> None:
        """Return when it accepts connections. Raises DevstackError when it does not in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
                return
            except OSError as error:
                if not self.is_running() or time.monotonic() > deadline:
                    raise DevstackError(f"the embedded broker on port {self.port} does not start: {error}") from error
                time.sleep(0.02)


class MockCluster:
    """One broker of librdkafka's mock cluster on a port of our choice; it lives in this process's threads."""

    def __init__(self, port: int, topics: Sequence[str]) -> None:
        library = _librdkafka()
        error = ctypes.create_string_buffer(512)
        configuration = library.rd_kafka_conf_new()
        # Errors only: clients that come and go, and this client that has no broker to talk to, are no news.
        library.rd_kafka_conf_set(configuration, b"log_level", b"3", error, len(error))
        handle = library.rd_kafka_new(_PRODUCER, configuration, error, len(error))
        if not handle:
            raise DevstackError(f"librdkafka: {error.value.decode()}")
        cluster = library.rd_kafka_mock_cluster_new(handle, 1)
        if not cluster:
            raise DevstackError("librdkafka could not make its mock cluster")
        # Members join within moments here: waiting for more only makes every start three seconds longer.
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 0)
        for topic in topics:
            code = library.rd_kafka_mock_topic_create(cluster, topic.encode(), PARTITIONS, 1)
            if code:
                raise DevstackError(f"librdkafka could not create {topic}: error {code}")
        _, _, port_given = library.rd_kafka_mock_cluster_bootstraps(cluster).decode().rpartition(":")
        library.rd_kafka_mock_broker_set_host_port(cluster, _BROKER_ID, HOST.encode(), port)
        _move_listener(int(port_given), port)


def _move_listener(from_port: int, to_port: int) -> None:
    """Make the mock broker listen on `to_port`. Raises DevstackError when it is taken.

    librdkafka binds any free port and has no call to choose one; clients need a broker that comes back where
    it was. So a listening socket of ours takes the place of its socket, under the same file descriptor.
    """
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind((HOST, to_port))
        except OSError as error:
            raise DevstackError(f"port {to_port} is taken: {error}") from error
        ours.listen(128)
        ours.setblocking(False)
        for descriptor in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as theirs:
                if theirs.getsockname() == (HOST, from_port):
                    os.dup2(ours.fileno(), descriptor)
                    return
    raise DevstackError("librdkafka's listening socket was not found")


def _librdkafka() -> ctypes.CDLL:
    """The library confluent_kafka brings along. Raises DevstackError when it is not where wheels put it."""
    package = Path(confluent_kafka.__file__).parent
    for directory in (package.parent / "confluent_kafka.libs", package / ".dylibs"):
        for path in directory.glob("librdkafka*"):
            library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
    raise DevstackError(f"no librdkafka beside {package}: is confluent-kafka installed from a wheel?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("topics", nargs="+", help=f"topics to create, with {PARTITIONS} partitions each")
    options = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGINT):
        # Not destroyed in order: librdkafka waits for its clients, and there is nothing to save. Nor by way of an
        # Event: its lock can be held by the very wait that the handler interrupts.
        signal.signal(number, lambda *_: os._exit(0))
    parent = os.getppid()
    try:
        MockCluster(options.port, options.topics)
    except DevstackError as error:
        sys.exit(f"embedded broker: {error}")
    sys.stdout.write(f"embedded broker on {HOST}:{options.port}: in memory, forgets everything when it stops\n")
    sys.stdout.flush()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main()
