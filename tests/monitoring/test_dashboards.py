"""Grafana's dashboards: current, complete, of one layout, and about series that exist."""

import json
import re
from itertools import combinations
from pathlib import Path

import prometheus_client
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from monitoring import metrics
from monitoring.ops.grafana import dashboards

OPS = Path(__file__).resolve().parent.parent.parent / "monitoring/ops"
PROVISIONING = OPS / "grafana/provisioning"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((OPS / "grafana/dashboards").glob("*.json"))}
DATASOURCES = yaml.safe_load((PROVISIONING / "datasources/datasources.yml").read_text())["datasources"]
RULES = [
    rule
    for path in (OPS / "rules").glob("*.yml")
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RUNBOOK = (OPS.parent.parent / "docs/runbook.md").read_text()
# Prometheus' own.
SCRAPE_SERIES = {"up", "scrape_duration_seconds", "ALERTS"}

PANELS = [
    pytest.param(dashboard, panel, id=f"{name}: {panel['title']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
each_panel = pytest.mark.parametrize(("dashboard", "panel"), PANELS)


def declared_series():
    """What monitoring/metrics.py makes: sample names, with the labels of each."""
    found = {"monitoring_collector_up": {"collector"}}
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            labels = set(value._labelnames)
            if isinstance(value, prometheus_client.Histogram):
                found |= {f"{value._name}_{part}": labels for part in ("sum", "count")}
                found[f"{value._name}_bucket"] = labels | {"le"}
            else:
                name = value._name + ("_total" if isinstance(value, prometheus_client.Counter) else "")
                found[name] = labels
        elif getattr(value, "func", None) is metrics.GaugeMetricFamily:
            found[value.args[0]] = set(value.keywords.get("labels", ()))
    return found


def series_in(expression):
    """The series that an expression selects."""
    without_labels = re.sub(r"\{[^}]*\}|\b(by|on|without|group_left)\s*\([^)]*\)|\[[^]]*\]|\"[^\"]*\"", " ", expression)
    words = re.findall(r"(?<![$\w.])[a-zA-Z_:][\w:]*(?!\w*\()", without_labels)
    return {word for word in words if ":" in word or "_" in word or word in SCRAPE_SERIES} - {
        *("avg_over_time", "histogram_quantile", "group_left")
    }


def test_declared_series_are_found():
    declared = declared_series()
    assert declared["http_request_duration_seconds_bucket"] == {"service", "method", "path", "le"}
    assert declared["consumer_dead_letters"] == {"consumer"}
    assert "outbox_relay_leader" in declared
    found = series_in('sum by (a_b) (rate(x_total{c_d=~"e_f"}[5m])) / on (g_h) (service:y_z:ratio_rate5m > 0) or up')
    assert found == {"x_total", "service:y_z:ratio_rate5m", "up"}


def test_files_are_what_the_source_gives():
    contents = dashboards.files()
    assert {path.stem for path in contents} == set(DASHBOARDS)
    for path, text in contents.items():
        assert path.read_text() == text, "run: make dashboards"


def test_there_is_one_for_each_part():
    parts = {"overview", "http", "grpc", "events", "consumers", "llm", "cache", "database", "milvus"}
    assert set(DASHBOARDS) == parts
    for name, dashboard in DASHBOARDS.items():
        assert dashboard["uid"] == f"voicehelper-{name}"
    assert len({dashboard["title"] for dashboard in DASHBOARDS.values()}) == len(parts)


@each_dashboard
def test_links_to_the_others_and_to_the_runbook(dashboard):
    to_others, to_runbook = dashboard["links"]
    assert to_others["tags"] == dashboard["tags"] == ["voicehelper"]
    assert to_runbook["url"] == "/public/docs/runbook.md"


@each_dashboard
def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels if panel["type"] != "row"]
    assert len(set(titles)) == len(titles)
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@each_panel
def test_panel_says_what_it_shows(dashboard, panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    uids = {source["uid"]: source["type"] for source in DATASOURCES}
    for target in panel["targets"]:
        assert target["legendFormat"] != "__auto" or panel["type"] == "stat"
        for source in (panel["datasource"], target["datasource"]):
            assert uids[source["uid"]] == source["type"]


@each_panel
def test_panel_asks_for_series_and_labels_that_exist(dashboard, panel):
    declared = declared_series()
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for target in panel["targets"]:
        names = series_in(target["expr"])
        assert names
        assert names <= set(declared) | recorded | SCRAPE_SERIES
        assert set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"} <= variables
        for name, selector in re.findall(r"([\w:]+)\{([^}]*)\}", target["expr"]):
            if name in declared:
                assert set(re.findall(r"(\w+)[!=]", selector)) <= declared[name] | {"job"}
        # What a legend names is what the result keeps.
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
        kept |= {name.split(":")[0] for name in names & recorded}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept | {"cache_name"}


@each_dashboard
def test_variables_offer_the_values_of_a_label(dashboard):
    declared = declared_series()
    used = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
        assert label == variable["name"]
        assert label in declared[metric]
        # Several may be chosen: they make a regular expression.
        assert f'{label}=~"${label}"' in used
        assert not re.search(rf'[^~]"\${label}"', used)


@each_panel
def test_limits_are_those_of_the_alerts(dashboard, panel):
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    if not panel["links"]:
        assert len(steps) == 1
        return
    [link] = panel["links"]
    alert = link["title"].removeprefix("Runbook: ")
    assert link["url"] == f"/public/docs/runbook.md#{alert.lower()}"
    assert f"## {alert}\n" in RUNBOOK
    assert ALERTS[alert]["annotations"]["dashboard_url"].endswith(dashboard["uid"]) or "overview" in dashboard["uid"]
    if alert in dashboards.LIMITS:
        sign, limit = re.search(r"(>|<|==) ([\d.]+)", ALERTS[alert]["expr"]).groups()
        assert float(limit) == dashboards.LIMITS[alert]
        assert (sign == "<") == (alert in dashboards.LOWER_LIMITS)
        assert steps[1]["value"] == (float(limit) or 1)
        assert steps[1]["color"] == ("green" if sign == "<" else "red")


def test_every_alert_is_on_the_dashboard_it_names():
    shown = {
        (dashboard["uid"], link["title"].removeprefix("Runbook: "))
        for dashboard in DASHBOARDS.values()
        for panel in dashboard["panels"]
        for link in panel.get("links", ())
    }
    # These are about what a panel can not show by itself, or the same as another one.
    beside = {
        *("ErrorBudgetBurns", "ErrorBudgetBurnsSlowly", "WebDown"),
        *("RelayDown", "RelayWithSeveralLeaders", "ConsumerDown", "ConsumerLagUnknown"),
    }
    named = {(rule["annotations"]["dashboard_url"].rsplit("/", 1)[1], name) for name, rule in ALERTS.items()}
    assert {alert for _, alert in named - shown} == beside


def test_exemplars_lead_to_the_traces():
    [prometheus] = [source for source in DATASOURCES if source["type"] == "prometheus"]
    [exemplar] = prometheus["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplar["name"] == "trace_id"
    assert exemplar["datasourceUid"] in {source["uid"] for source in DATASOURCES if source["type"] == "jaeger"}
    with_exemplars = {
        series
        for dashboard in DASHBOARDS.values()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        if target.get("exemplar")
        for series in series_in(target["expr"])
    }
    assert "http_request_duration_seconds_bucket" in with_exemplars
    assert all(series.endswith("_bucket") for series in with_exemplars)
