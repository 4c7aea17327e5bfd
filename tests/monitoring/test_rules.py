"""Alert and recording rules: accepted by Prometheus, tested by promtool, and complete in what an alert needs."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from django.core.management import get_commands, load_command_class

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = ROOT / "monitoring/ops"
RULES = {path.stem: yaml.safe_load(path.read_text()) for path in (OPS / "rules").glob("*.yml")}
ALERTS = {rule["alert"]: rule for group in RULES["alerts"]["groups"] for rule in group["rules"]}
TESTS = sorted((OPS / "rules/tests").glob("*.yml"))
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.DOTALL | re.MULTILINE))
# Silence is what they are there for.
FIRE_WITHOUT_DATA = {"WebDown", "RelayDown", "RelayWithoutLeader"}
WITHOUT_RATIO_OR_RATE = FIRE_WITHOUT_DATA | {
    *(
        "RelayWithSeveralLeaders",
        "RelayPaused",
        "OutboxEventsWait",
        "OutboxEventsUndeliverable",
        "OutboxTransactionOpen",
    ),
    *("ConsumerLag", "ConsumerLate", "ConsumerLagUnknown", "ConsumerDown", "ConsumerPaused"),
    *("DeliveriesWait", "EmailsFail"),
    *("TargetDown", "MonitoringCollectorDown"),
}
# One dead letter, or three deaths, are what they are about.
COUNT_SINGLE_EVENTS = {"ConsumerDeadLetters", "ConsumerWorkersDie"}

each_alert = pytest.mark.parametrize("name", sorted(ALERTS))


def promtool(*arguments):
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs_tool("promtool")
def test_promtool_accepts_the_rules():
    promtool("check", "rules", *(OPS / "rules").glob("*.yml"))


@pytest.mark.needs_tool("promtool")
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_rules(file):
    promtool("test", "rules", file)


def cases():
    """For each alert and name of a test group: whether it is expected to fire, in the order of the evaluations."""
    found = defaultdict(lambda: defaultdict(list))
    for file in TESTS:
        for group in yaml.safe_load(file.read_text())["tests"]:
            for case in group["alert_rule_test"]:
                found[case["alertname"]][group["name"]].append(bool(case["exp_alerts"]))
    return found


@each_alert
def test_fires_stays_quiet_and_is_tested_without_data(name):
    groups = cases()[name]
    assert groups["no data"] == [name in FIRE_WITHOUT_DATA]
    assert groups["no traffic"] == [False]
    fired = groups[name]
    # Quiet before: the group that makes it fire shows first that less than that does not.
    assert fired[0] is False
    assert True in fired


def test_every_test_group_evaluates_what_is_recorded_before_the_alerts():
    order = [group["name"] for file in ("recording", "alerts") for group in RULES[file]["groups"]]
    for file in TESTS:
        assert yaml.safe_load(file.read_text())["group_eval_order"] == order, file.name


@each_alert
def test_says_what_an_alert_has_to_say(name):
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert ("for" in rule) != (name in COUNT_SINGLE_EVENTS)
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert notes["runbook_url"] == "{{ $externalLabels.docs_url }}/runbook.md#" + name.lower()
    dashboard = re.fullmatch(r"\{\{ \$externalLabels\.grafana_url \}\}/d/voicehelper-(\w+)", notes["dashboard_url"])
    assert (OPS / f"grafana/dashboards/{dashboard[1]}.json").exists()


@each_alert
def test_asks_for_a_minimum_of_traffic(name):
    needs_none = name in WITHOUT_RATIO_OR_RATE | COUNT_SINGLE_EVENTS
    assert bool(re.search(r"^and (?!on).+ > [\d /]+$", ALERTS[name]["expr"], re.MULTILINE)) != needs_none


@each_alert
def test_runbook_has_a_section(name):
    assert SECTIONS[name].strip().startswith(f"*{ALERTS[name]['labels']['severity']}.*")
    assert re.search(r"\*\*Do\*\*|Look and do", SECTIONS[name])


def test_runbook_has_no_section_of_an_alert_that_is_gone_and_no_dead_link():
    assert list(SECTIONS) == list(ALERTS)
    anchors = {name.lower() for name in SECTIONS}
    assert set(re.findall(r"\]\(#(\w+)\)", RUNBOOK)) <= anchors
    assert "## Operations" in (ROOT / "README.md").read_text()


def test_runbooks_commands_exist_and_take_their_arguments():
    lines = re.findall(r"^python manage\.py (.+)$", RUNBOOK, re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        command, *arguments = re.findall(r'"[^"]*"|\S+', line)
        command_class = load_command_class(get_commands()[command], command)
        command_class.create_parser("manage.py", command).parse_args(arguments)


@pytest.mark.needs_tool("amtool")
def test_amtool_accepts_the_receivers():
    command = ["amtool", "check-config", OPS / "alertmanager.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs_tool("amtool")
@pytest.mark.parametrize(("severity", "receiver"), [("page", "pager"), ("ticket", "tickets")])
def test_alerts_reach_their_receiver(severity, receiver):
    command = ["amtool", "config", "routes", "test", "--config.file", OPS / "alertmanager.yml", f"severity={severity}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == receiver


def test_inhibitions_name_alerts_that_exist():
    rules = yaml.safe_load((OPS / "alertmanager.yml").read_text())["inhibit_rules"]
    text = " ".join(matcher for rule in rules for matcher in rule["source_matchers"] + rule["target_matchers"])
    named = {name for names in re.findall(r'alertname=~?"([^"]+)"', text) for name in names.split("|")}
    assert named
    assert named <= set(ALERTS)
