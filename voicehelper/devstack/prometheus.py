"""Prometheus as a process of the devstack, where the program is installed: figures over time, rules, alerts."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from voicehelper.devstack.child import Child
from voicehelper.services import BASE_DIR

HOST = "127.0.0.1"
SCRAPE_SECONDS = 5
OPS = BASE_DIR / "monitoring" / "ops"


def is_installed() -> bool:
    return shutil.which("prometheus") is not None


class Prometheus(Child):
    """The process, with the product's own rules. It keeps what it scraped in `data_dir`, for two days."""

    def __init__(self, data_dir: Path, port: int, targets: Mapping[str, Sequence[int]], *, output: int) -> None:
        """`targets`: the ports that each job scrapes."""
        self.url = f"http://{HOST}:{port}"
        self._data_dir = data_dir
        self._targets = targets
        super().__init__(
            "prometheus",
            [
                "prometheus",
                f"--config.file={data_dir / 'prometheus.yml'}",
                f"--storage.tsdb.path={data_dir / 'series'}",
                "--storage.tsdb.retention.time=2d",
                f"--web.listen-address={HOST}:{port}",
                "--enable-feature=exemplar-storage,expand-external-labels",
                "--log.level=warn",
            ],
            output=output,
        )

    def start(self) -> None:
        self._data_dir.mkdir(parents=True, exist_ok=True)
        # JSON is YAML, too.
        (self._data_dir / "prometheus.yml").write_text(json.dumps(self._configuration(), indent=2))
        super().start()

    def _configuration(self) -> dict[str, object]:
        return {
            "global": {
                "scrape_interval": f"{SCRAPE_SECONDS}s",
                "scrape_timeout": f"{SCRAPE_SECONDS}s",
                "evaluation_interval": f"{SCRAPE_SECONDS}s",
                "external_labels": {"docs_url": "docs", "grafana_url": ""},
            },
            "rule_files": [str(OPS / "rules" / "*.yml")],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [f"{HOST}:{port}" for port in ports]}]}
                for job, ports in self._targets.items()
            ],
        }
