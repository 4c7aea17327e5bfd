"""Where PostgreSQL and Kafka are: the environment first, then what `make up` wrote for other terminals."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = Path(os.environ.get("VOICEHELPER_DATA_DIR") or BASE_DIR / ".data")
SERVICES_FILE = DATA_DIR / "services.json"


@dataclass(frozen=True)
class Services:
    """`database_url` and `kafka_bootstrap_servers` are empty when nobody named them.

    `milvus_uri`: where the Milvus of a running `make up` is; empty when there is none.
    `kafka_is_embedded`: the broker is the in-memory one that `make up` starts (never for production).
    """

    database_url: str = ""
    kafka_bootstrap_servers: str = ""
    kafka_is_embedded: bool = False
    web_url: str = "http://127.0.0.1:8000"
    milvus_uri: str = ""


def find_services() -> Services:
    """`DATABASE_URL` / `KAFKA_BOOTSTRAP_SERVERS`, else the running `make up`'s services.

    Raises ValueError when the services file is damaged.
    """
    written = Services()
    if SERVICES_FILE.exists():
        try:
            written = Services(**json.loads(SERVICES_FILE.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{SERVICES_FILE} is damaged ({error}): delete it and run `make up` again") from error
    from_environment = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "")
    return Services(
        database_url=os.environ.get("DATABASE_URL") or written.database_url,
        kafka_bootstrap_servers=from_environment or written.kafka_bootstrap_servers,
        kafka_is_embedded=not from_environment and written.kafka_is_embedded,
        web_url=written.web_url,
        milvus_uri=written.milvus_uri,
    )


def write_services(services: Services) -> None:
    """Publish the running services to other terminals, in one step (a reader never sees half a file)."""
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    temporary = SERVICES_FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(services.__dict__))
    temporary.chmod(0o600)
    temporary.replace(SERVICES_FILE)
