"""What the figures were measured on."""

import os
import platform
import subprocess
from pathlib import Path

import confluent_kafka
import google.protobuf
import psutil
import psycopg
from google.protobuf.internal import api_implementation

from voicehelper.devstack.apache_kafka import VERSION as KAFKA_VERSION


def describe(database_url: str, data_dir: Path) -> dict[str, str]:
    with psycopg.connect(database_url) as connection:
        (postgres,) = connection.execute("SHOW server_version").fetchall()[0]
    return {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "data directory": _filesystem(data_dir),
        "load before the run": f"{os.getloadavg()[0]:.2f} (one minute; near 0 on a quiet machine)",
        "PostgreSQL": f"{postgres}, fsync on, {', '.join(f'{k}={v}' for k, v in POSTGRES_SETTINGS.items())}",
        "Apache Kafka": f"{KAFKA_VERSION}, one node, {_java()}",
        "Python": platform.python_version(),
        "confluent-kafka": f"{confluent_kafka.version()}, librdkafka {confluent_kafka.libversion()[0]}",
        "protobuf": f"{google.protobuf.__version__} ({api_implementation.Type()})",
        "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})",
    }


# A checkpoint in the midst of a run would be a fault of the bench, which writes millions of rows at once.
POSTGRES_SETTINGS = {"max_wal_size": "16GB", "checkpoint_timeout": "30min"}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _filesystem(path: Path) -> str:
    mounts = [m for m in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown file system"


def _java() -> str:
    lines = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr.splitlines()
    return lines[0] if lines else "Java"
