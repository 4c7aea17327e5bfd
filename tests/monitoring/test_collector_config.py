"""The collector's configurations: every part that a pipeline names is there, and no other."""

from pathlib import Path

import pytest
import yaml

OPS = Path(__file__).resolve().parent.parent.parent / "monitoring" / "ops"
FILES = sorted(OPS.glob("otel-collector*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pipelines_name_what_is_there(file):
    config = yaml.safe_load(file.read_text())
    for kind in ("receivers", "processors", "exporters"):
        named = {name for pipeline in config["service"]["pipelines"].values() for name in pipeline[kind]}
        assert named == config[kind].keys()
    # What bounds its memory comes first, what makes batches last.
    processors = config["service"]["pipelines"]["traces"]["processors"]
    assert (processors[0], processors[-1]) == ("memory_limiter", "batch")


def test_one_chooses_and_the_other_takes_what_it_gets():
    plain, choosing = (
        yaml.safe_load((OPS / f"otel-collector{kind}.yaml").read_text()) for kind in ("", "-tail-sampling")
    )
    assert "tail_sampling" not in plain["processors"]
    policies = {policy["type"]: policy for policy in choosing["processors"].pop("tail_sampling")["policies"]}
    assert policies.keys() == {"status_code", "numeric_attribute", "latency", "probabilistic"}
    assert policies["latency"]["latency"]["threshold_ms"] == 1000
    assert plain["receivers"] == choosing["receivers"] and plain["exporters"] == choosing["exporters"]
