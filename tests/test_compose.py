"""docker-compose.yml and what it runs: valid, pinned, checked, restarted, without secrets of its own.

compose-spec.json is schema/compose-spec.json of github.com/compose-spec/compose-go v2.16.2 (Apache-2.0).
"""

import argparse
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
from monitoring import healthcheck
from tests.environment import variables

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
HEADER = (ROOT / "docker-compose.yml").read_text().partition("\nname:")[0]
ONE_SHOT = {"migrate"}
CONSUMERS = {"analytics": 9102, "notification": 9103, "audit": 9104, "knowledge": 9105}
OPS = ROOT / "monitoring/ops"
OURS = {name for name, service in SERVICES.items() if service["image"].startswith("voicehelper:")}
# The containers are given none of these: port and places are the image's, Kafka is the one beside them, alone and in
# plain text, and a file with a secret has to be mounted by who names it.
NOT_GIVEN = re.compile(
    r"WEB_HOST|(WEB|KAFKA|METRICS|MILVUS|PROMETHEUS)_PORT|\w+_DIR|\w+_FILE"
    r"|KAFKA_(SECURITY_PROTOCOL|SASL_\w+|SSL_\w+|OAUTH_\w+|REPLICATION_FACTOR)"
)
LOOPBACK = re.compile(r"\$\{(WEB|MONITORING)_ADDRESS:-127\.0\.0\.1\}:(\d+):(\d+)")
PROMETHEUS = yaml.safe_load((OPS / "prometheus.yml").read_text())

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def probed(name):
    """What a container of ours asks itself."""
    kind, program, option, module, *arguments = SERVICES[name]["healthcheck"]["test"]
    assert (kind, program, option, module) == ("CMD", "python", "-m", healthcheck.__name__)
    parser = argparse.ArgumentParser()
    healthcheck.add_arguments(parser)
    options = vars(parser.parse_args(arguments))
    # It gives up before its container does.
    assert options["timeout"] < float(SERVICES[name]["healthcheck"]["timeout"].removesuffix("s"))
    return healthcheck.address(options)


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
        *("postgres", "kafka", "redis", "milvus", "migrate", "web", "relay", "delivery"),
        *("prometheus", "alertmanager", "grafana", "otel-collector", "jaeger"),
    }
    assert SERVICES["relay"]["deploy"]["replicas"] == 2


@each_service
def test_image_is_pinned(name):
    image, _, tag = SERVICES[name]["image"].rpartition(":")
    assert re.fullmatch(r"[a-z0-9/._-]+", image)
    assert re.fullmatch(r"v?\d+(\.\d+)+", tag)


def test_image_made_here_is_of_pinned_ones_and_named_after_them():
    made = SERVICES["otel-collector"]
    [base] = re.findall(r"^FROM (\S+)$", made["build"]["dockerfile_inline"], re.MULTILINE)
    [probe] = re.findall(r"^COPY --from=(\S+) ", made["build"]["dockerfile_inline"], re.MULTILINE)
    assert re.fullmatch(r"busybox:\d+\.\d+\.\d+-musl", probe)  # linked statically: it runs in an empty image
    assert base.rpartition(":")[2] == made["image"].rpartition(":")[2]
    assert f" {made['healthcheck']['test'][1]}\n" in made["build"]["dockerfile_inline"]


def test_collector_is_asked_where_it_answers():
    for file in OPS.glob("otel-collector*.yaml"):
        [reader] = yaml.safe_load(file.read_text())["service"]["telemetry"]["metrics"]["readers"]
        port = reader["pull"]["exporter"]["prometheus"]["port"]
        assert SERVICES["otel-collector"]["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}/metrics"
        assert scraped()["otel-collector"]["static_configs"][0]["targets"] == [f"otel-collector:{port}"]


@each_service
def test_nothing_is_published_beyond_this_machine(name):
    for port in SERVICES[name].get("ports", []):
        address, outside, inside = LOOPBACK.fullmatch(port).groups()
        assert outside == inside
        assert (address == "WEB") == (name == "web")
    assert "network_mode" not in SERVICES[name]


def test_published_are_the_pages_for_people():
    published = {name: port for name in SERVICES for port in SERVICES[name].get("ports", [])}
    assert set(published) == {"web", "grafana", "prometheus", "alertmanager", "jaeger"}
    for port in published.values():
        assert f"http://localhost:{LOOPBACK.fullmatch(port)[2]}" in HEADER


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
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")


@each_service
def test_no_literal_secret(name):
    for variable, value in (SERVICES[name].get("environment") or {}).items():
        if value is None:  # passed on from the environment where it is set there: nobody needs it
            continue
        if re.search("PASSWORD|SECRET|TOKEN|KEY", variable):
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", str(value)), variable
            assert value.partition(":")[0].removeprefix("${") in HEADER
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
        assert source in COMPOSE["volumes"] or (source.startswith("./") and (ROOT / source).exists())
        assert source in COMPOSE["volumes"] or volume.endswith(":ro")


@each_service
def test_commands_exist_and_take_their_arguments(name):
    for line in re.findall(r"python manage\.py ([^&]+)", command_line(name)):
        command, *arguments = line.split()
        command_class = load_command_class(get_commands()[command], command)
        command_class.create_parser("manage.py", command).parse_args(arguments)


def test_environment_is_what_the_code_reads_and_all_of_it():
    read = variables()
    given = set(SERVICES["web"]["environment"])
    assert given <= read | {"OTEL_EXPORTER_OTLP_ENDPOINT"}
    assert {name for name in read - given if not NOT_GIVEN.fullmatch(name)} == set()


def test_every_process_of_ours_has_the_same_environment():
    assert {"migrate", "web", "relay", "delivery"} < OURS
    for name in OURS:
        assert SERVICES[name]["environment"] == SERVICES["web"]["environment"], name


def test_milvus_is_alone_keeps_its_data_and_is_where_ours_look_for_it():
    milvus = SERVICES["milvus"]
    assert milvus["environment"]["DEPLOY_MODE"] == "STANDALONE"  # without it, it refuses to have etcd within it
    [volume] = milvus["volumes"]
    assert milvus["environment"]["ETCD_DATA_DIR"].startswith(volume.partition(":")[2])
    [config] = milvus["configs"]
    assert config["target"] == milvus["environment"]["ETCD_CONFIG_PATH"]
    etcd = yaml.safe_load(COMPOSE["configs"][config["source"]]["content"])
    assert etcd["listen-client-urls"] == "http://127.0.0.1:2379"  # it knows no passwords
    assert etcd["auto-compaction-mode"] == "revision"
    assert SERVICES["web"]["environment"]["MILVUS_URI"] == "${MILVUS_URI:-http://milvus:19530}"
    assert scraped()["milvus"]["static_configs"][0]["targets"] == ["milvus:9091"]
    assert milvus["healthcheck"]["test"][-1] == "http://localhost:9091/healthz"
    assert "ports" not in milvus
    assert {name for name in SERVICES if "milvus" in SERVICES[name].get("depends_on", {})} == {"consumer-knowledge"}


@pytest.mark.parametrize(("consumer", "port"), CONSUMERS.items())
def test_consumer_is_one_and_is_probed_and_scraped_on_its_port(consumer, port):
    name = f"consumer-{consumer}"
    assert consumer_named(consumer).name == consumer
    assert f"consume {consumer} --metrics-port {port}" in command_line(name)
    assert probed(name) == f"http://127.0.0.1:{port}/livez"
    assert f"{name}:{port}" in scraped()["consumer"]["static_configs"][0]["targets"]


def test_deliveries_are_sent_probed_and_scraped_on_their_port():
    assert "deliver_notifications --metrics-port 9110" in command_line("delivery")
    assert probed("delivery") == "http://127.0.0.1:9110/livez"
    assert scraped()["delivery"]["static_configs"][0]["targets"] == ["delivery:9110"]


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
    assert probed("web") == f"http://127.0.0.1:{port}/readyz"
    assert probed("relay") == "http://127.0.0.1:9101/livez"


def test_spans_go_through_the_collector_to_jaeger():
    collector = yaml.safe_load((ROOT / "monitoring/ops/otel-collector.yaml").read_text())
    assert SERVICES["web"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector:4317"
    assert collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    pipeline = collector["service"]["pipelines"]["traces"]
    assert pipeline["receivers"] == ["otlp"]
    assert set(pipeline["processors"]) <= set(collector["processors"])
    [exporter] = pipeline["exporters"]
    assert collector["exporters"][exporter]["endpoint"] == "jaeger:4317"


def test_prometheus_scrapes_what_is_there():
    for job in PROMETHEUS["scrape_configs"]:
        targets = [target for config in job.get("static_configs", []) for target in config["targets"]]
        hosts = {target.partition(":")[0] for target in targets} | {
            name for config in job.get("dns_sd_configs", []) for name in config["names"]
        }
        assert hosts
        assert hosts - {"localhost"} <= set(SERVICES)
    assert scraped()["prometheus"]["static_configs"][0]["targets"] == ["localhost:9090"]
    assert {"alertmanager", "grafana", "otel-collector"} <= set(scraped())


def mounted(name):
    """What of this repository a service finds where."""
    volumes = [volume.split(":") for volume in SERVICES[name]["volumes"]]
    return {inside: ROOT / source for source, inside, *_ in volumes if source.startswith("./")}


def test_prometheus_finds_its_rules_and_its_alertmanager():
    assert mounted("prometheus")["/etc/prometheus/prometheus.yml"] == OPS / "prometheus.yml"
    assert PROMETHEUS["rule_files"] == ["rules/*.yml"]
    assert {path.name for path in mounted("prometheus")["/etc/prometheus/rules"].glob("*.yml")} == {
        *("recording.yml", "alerts.yml")
    }
    [target] = PROMETHEUS["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert target == "alertmanager:9093"
    assert mounted("alertmanager")["/etc/alertmanager/alertmanager.yml"] == OPS / "alertmanager.yml"
    assert "--config.file=/etc/alertmanager/alertmanager.yml" in command_line("alertmanager")


def test_prometheus_keeps_exemplars_and_knows_where_links_of_alerts_lead():
    assert "--enable-feature=exemplar-storage" in command_line("prometheus")
    needed = {value.strip("${}") for value in PROMETHEUS["global"]["external_labels"].values()}
    assert needed == set(SERVICES["prometheus"]["environment"])
    [relabel] = PROMETHEUS["alerting"]["alert_relabel_configs"]
    assert relabel["action"] == "labeldrop"
    assert set(relabel["regex"].split("|")) == set(PROMETHEUS["global"]["external_labels"])


def test_grafana_finds_dashboards_data_sources_and_the_runbook():
    places = mounted("grafana")
    [provider] = yaml.safe_load((places["/etc/grafana/provisioning/dashboards"] / "dashboards.yml").read_text())[
        "providers"
    ]
    dashboards = places[provider["options"]["path"]]
    assert list(dashboards.glob("*.json"))
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (dashboards / Path(home).name).exists()
    assert home.startswith(provider["options"]["path"])
    sources = yaml.safe_load((places["/etc/grafana/provisioning/datasources"] / "datasources.yml").read_text())
    for source in sources["datasources"]:
        host, port = re.fullmatch(r"http://([\w-]+):(\d+)", source["url"]).groups()
        assert f":{port}" in SERVICES[host]["ports"][0]
    assert (places["/usr/share/grafana/public/docs"] / "runbook.md").exists()
    assert SERVICES["prometheus"]["environment"]["DOCS_URL"].endswith(":3000/public/docs}")


def test_grafana_lets_nobody_in_without_a_password():
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD"] == "${GRAFANA_ADMIN_PASSWORD:?set GRAFANA_ADMIN_PASSWORD}"
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == environment["GF_USERS_ALLOW_SIGN_UP"] == "false"


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
