"""A Kafka broker without Kafka: librdkafka's mock cluster, in a process of its own.

`python -m events_outbox.embedded_broker --port 9092 conversation.events document.events`

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
import subprocess
import sys
import time
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int32, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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


class EmbeddedBrokerError(Exception):
    """The broker does not start; the text says why."""


class EmbeddedBroker:
    """The broker in a process of its own, for the length of a `with` block; on a free port.

    `partitions`: of each topic. It ends with this process, however that ends. Raises EmbeddedBrokerError when it does
    not start.
    """

    def __init__(self, topics: Sequence[str], *, partitions: int = PARTITIONS) -> None:
        self.topics = topics
        self.partitions = partitions
        self.bootstrap_servers = ""

    def __enter__(self) -> Self:
        options = ["--port=0", f"--partitions={self.partitions}", *self.topics]
        command = [sys.executable, "-m", "events_outbox.embedded_broker", *options]
        package = Path(__file__).parent.parent  # where it is found, whatever this process's directory is
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=package, process_group=0)  # noqa: S603
        assert self._process.stdout is not None  # noqa: S101  (narrowing)
        # It says where it listens, or ends without a word.
        with self._process.stdout as lines:
            words = lines.readline().decode().split()
        if not words:
            self.__exit__(None, None, None)
            raise EmbeddedBrokerError("the embedded broker does not start: its error output says why")
        self.bootstrap_servers = words[0]
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()  # there is nothing that it would have to save
        self._process.wait()


class MockCluster:
    """One broker of librdkafka's mock cluster; it lives in this process's threads.

    `port`: 0 takes any that is free; the attribute says which. Raises EmbeddedBrokerError.
    """

    def __init__(self, port: int, topics: Sequence[str], *, partitions: int = PARTITIONS) -> None:
        library = _librdkafka()
        error = ctypes.create_string_buffer(512)
        configuration = library.rd_kafka_conf_new()
        # Errors only: clients that come and go, and this client that has no broker to talk to, are no news.
        library.rd_kafka_conf_set(configuration, b"log_level", b"3", error, len(error))
        handle = library.rd_kafka_new(_PRODUCER, configuration, error, len(error))
        if not handle:
            raise EmbeddedBrokerError(f"librdkafka: {error.value.decode()}")
        cluster = library.rd_kafka_mock_cluster_new(handle, 1)
        if not cluster:
            raise EmbeddedBrokerError("librdkafka could not make its mock cluster")
        # Members join within moments here: waiting for more only makes every start three seconds longer.
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 0)
        for topic in topics:
            code = library.rd_kafka_mock_topic_create(cluster, topic.encode(), partitions, 1)
            if code:
                raise EmbeddedBrokerError(f"librdkafka could not create {topic}: error {code}")
        _, _, port_given = library.rd_kafka_mock_cluster_bootstraps(cluster).decode().rpartition(":")
        self.port = port or int(port_given)
        library.rd_kafka_mock_broker_set_host_port(cluster, _BROKER_ID, HOST.encode(), self.port)
        if port:
            _move_listener(int(port_given), port)


def _move_listener(from_port: int, to_port: int) -> None:
    """Make the mock broker listen on `to_port`. Raises EmbeddedBrokerError when it is taken.

    librdkafka binds any free port and has no call to choose one; clients need a broker that comes back where
    it was. So a listening socket of ours takes the place of its socket, under the same file descriptor.
    """
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind((HOST, to_port))
        except OSError as error:
            raise EmbeddedBrokerError(f"port {to_port} is taken: {error}") from error
        ours.listen(128)
        ours.setblocking(False)
        for descriptor in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as theirs:
                if theirs.getsockname() == (HOST, from_port):
                    os.dup2(ours.fileno(), descriptor)
                    return
    raise EmbeddedBrokerError("librdkafka's listening socket was not found")


def _librdkafka() -> ctypes.CDLL:
    """The library confluent_kafka brings along. Raises EmbeddedBrokerError when it is not where wheels put it."""
    found = find_spec("confluent_kafka")
    package = Path(found.origin if found and found.origin else "").parent
    for directory in (package.parent / "confluent_kafka.libs", package / ".dylibs"):
        for path in directory.glob("librdkafka*"):
            library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
    raise EmbeddedBrokerError(f"no librdkafka beside {package}: is confluent-kafka installed from a wheel?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1; 0 takes any that is free")
    parser.add_argument("--partitions", type=int, default=PARTITIONS, help="of each topic (default: %(default)s)")
    parser.add_argument("topics", nargs="+", help="topics to create")
    options = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGINT):
        # Not destroyed in order: librdkafka waits for its clients, and there is nothing to save. Nor by way of an
        # Event: its lock can be held by the very wait that the handler interrupts.
        signal.signal(number, lambda *_: os._exit(0))
    parent = os.getppid()
    try:
        cluster = MockCluster(options.port, options.topics, partitions=options.partitions)
    except EmbeddedBrokerError as error:
        sys.exit(f"embedded broker: {error}")
    sys.stdout.write(f"{HOST}:{cluster.port} embedded broker: in memory, forgets everything when it stops\n")
    sys.stdout.flush()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main()
