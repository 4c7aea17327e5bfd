"""PostgreSQL and Apache Kafka of a bench run: their own, in a temporary directory, gone afterwards."""

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.services import free_ports


class Services:
    """Both servers, as durable as they are by default: PostgreSQL waits for the disk at every commit."""

    def __enter__(self) -> Self:
        self.data_dir = Path(tempfile.mkdtemp(prefix="voicehelper-bench-"))
        os.environ["VOICEHELPER_DATA_DIR"] = str(self.data_dir)
        # Imported here: settings and devstack read the environment when they are imported.
        from tests.benchmarks.machine import POSTGRES_SETTINGS
        from voicehelper.devstack.apache_kafka import ApacheKafka
        from voicehelper.devstack.postgres import EmbeddedPostgres

        self.log_path = self.data_dir / "services.log"
        self.log = self.log_path.open("ab")
        output = self.log.fileno()
        self.postgres = EmbeddedPostgres(self.data_dir / "postgres", output=output, settings=POSTGRES_SETTINGS)
        port, controller_port = free_ports(2)
        self.kafka = ApacheKafka(self.data_dir / "kafka", port, output=output, controller_port=controller_port)
        os.environ["DATABASE_URL"] = self.postgres.url
        os.environ["KAFKA_BOOTSTRAP_SERVERS"] = self.kafka.bootstrap_servers
        try:
            self.kafka.start()
            self.postgres.start()
            self.postgres.wait_until_ready()
            self.kafka.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kafka.kill()
        self.postgres.stop()
        self.log.close()
        shutil.rmtree(self.data_dir)
