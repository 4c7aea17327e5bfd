"""docker-compose.yml and what it runs: valid, pinned, checked, restarted, without secrets of its own.

compose-spec.json is schema/compose-spec.json of github.com/compose-spec/compose-go v2.16.2 (Apache-2.0).
"""

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from django.conf import settings
from django.core.management import get_commands, load_command_class

from events_outbox.handlers import consumer_named

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
ONE_SHOT = {"migrate"}
CONSUMERS = {"analytics": 9102, "notification": 9103, "audit": 9104}
# Its image holds the collector's binary alone: no program that could ask it.
WITHOUT_HEALTH_CHECK = {"otel-collector"}
PROMETHEUS = yaml.safe_load((ROOT / "monitoring/ops/prometheus.yml").read_text())

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def command_line(name):
    return " ".join(SERVICES[name].get("command", []))


def test_valid_against_the_compose_schema():
    schema = json.loads((ROOT / "tests/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.validate(COMPOSE)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"services": {"web": {"imagee": "x:1"}}})


def test_every_part_is_there():
    consumers = {f"consumer-{name}" for name in CONSUMERS}
    assert set(SERVICES) == consumers | {
        *("postgres", "kafka", "migrate", "web", "relay", "prometheus", "otel-collector", "jaeger")
    }
    assert SERVICES["relay"]["deploy"]["replicas"] == 2


@each_service
def test_image_is_pinned(name):
    image, _, tag = SERVICES[name]["image"].rpartition(":")
    assert re.fullmatch(r"[a-z0-9/._-]+", image)
    assert re.fullmatch(r"v?\d+(\.\d+)+", tag)


def test_base_image_is_pinned():
    [base] = re.findall(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim", base)


@each_service
def test_restarted_and_checked_unless_one_shot(name):
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert ("test" in service.get("healthcheck", {})) == (name not in WITHOUT_HEALTH_CHECK)


@each_service
def test_no_literal_secret(name):
    for variable, value in (SERVICES[name].get("environment") or {}).items():
        if re.search("PASSWORD|SECRET|TOKEN|KEY", variable):
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", str(value)), variable
        # A password in a URL, too, has to come from the environment.
        for password in re.findall(r"://[^:/@]+:(.+?)@", str(value)):
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", password), variable


@each_service
def test_waits_for_what_it_needs(name):
    for dependency, how in SERVICES[name].get("depends_on", {}).items():
        expected = "service_completed_successfully" if dependency in ONE_SHOT else "service_healthy"
        assert how["condition"] == expected
        assert dependency in ONE_SHOT or "healthcheck" in SERVICES[dependency]


@each_service
def test_volumes_are_declared_or_files_of_this_repository(name):
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (source.startswith("./") and (ROOT / source).is_file())


@each_service
def test_commands_exist_and_take_their_arguments(name):
    for line in re.findall(r"python manage\.py ([^&]+)", command_line(name)):
        command, *arguments = line.split()
        command_class = load_command_class(get_commands()[command], command)
        command_class.create_parser("manage.py", command).parse_args(arguments)


def test_environment_is_what_the_settings_read():
    source = (ROOT / "voicehelper/settings.py").read_text() + (ROOT / "voicehelper/services.py").read_text()
    for variable in SERVICES["web"]["environment"]:
        assert f'"{variable}"' in source


@pytest.mark.parametrize(("consumer", "port"), CONSUMERS.items())
def test_consumer_is_one_and_is_probed_and_scraped_on_its_port(consumer, port):
    name = f"consumer-{consumer}"
    assert consumer_named(consumer).name == consumer
    assert f"consume {consumer} --metrics-port {port}" in command_line(name)
    assert f"127.0.0.1:{port}/livez" in SERVICES[name]["healthcheck"]["test"][-1]
    assert f"{name}:{port}" in scraped()["consumer"]["static_configs"][0]["targets"]


def scraped():
    return {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}


def test_prometheus_scrapes_as_specified():
    assert PROMETHEUS["global"]["scrape_interval"] == "15s"
    assert "--storage.tsdb.retention.time=15d" in SERVICES["prometheus"]["command"]
    [relays] = scraped()["relay"]["dns_sd_configs"]
    assert (relays["names"], relays["port"]) == (["relay"], 9101)
    assert "--metrics-port 9101" in command_line("relay")
    # The web server answers only to the hosts it is allowed to.
    [web] = scraped()["web"]["static_configs"][0]["targets"]
    host, port = web.split(":")
    assert host in SERVICES["web"]["environment"]["DJANGO_ALLOWED_HOSTS"].split(",")
    assert f"127.0.0.1:{port}/readyz" in SERVICES["web"]["healthcheck"]["test"][-1]


def test_spans_go_through_the_collector_to_jaeger():
    collector = yaml.safe_load((ROOT / "monitoring/ops/otel-collector.yaml").read_text())
    assert SERVICES["web"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector:4317"
    assert collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    pipeline = collector["service"]["pipelines"]["traces"]
    assert pipeline["receivers"] == ["otlp"]
    assert set(pipeline["processors"]) <= set(collector["processors"])
    [exporter] = pipeline["exporters"]
    assert collector["exporters"][exporter]["endpoint"] == "jaeger:4317"


@pytest.mark.needs_tool("promtool")
def test_promtool_accepts_the_configuration():
    file = ROOT / "monitoring/ops/prometheus.yml"
    done = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_runs_without_root_and_has_only_what_production_needs():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "USER 10001" in lines
    assert lines.index("USER 10001") < next(i for i, line in enumerate(lines) if line.startswith("CMD"))
    assert not [line for line in lines if "requirements-dev" in line]
    copied = {line.split()[1] for line in lines if line.startswith("COPY")}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
    # Every application of the project is in the image.
    ours = {app.split(".")[0] for app in settings.INSTALLED_APPS} & {path.name for path in ROOT.iterdir()}
    assert ours <= copied
