"""Where the configuration of tracing comes from, and what is refused."""

import os

import pytest
from django.core.exceptions import ImproperlyConfigured

from monitoring.tracing import TracingConfig, tracing_config
from tests.secure_kafka import Certificates

OTLP = "OTEL_EXPORTER_OTLP_"


@pytest.fixture
def configured(settings, monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)

    def configure(given=None, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings.MONITORING = given or {}
        return tracing_config()

    return configure


def test_with_nothing_set_nothing_is_exported(configured):
    config = configured()
    assert (config.service_name, config.environment, config.enabled, config.sampling_rate) == (
        "django", "dev", False, 1.0,
    )  # fmt: skip


ATTRIBUTES = "service.name=a,service.version=1.2,deployment.environment.name=prod,team=x%20y"
E1, E2 = "http://one:4317", "two:4317"


@pytest.mark.parametrize(
    ("given", "variables", "expected"),
    [
        ({}, {OTLP + "ENDPOINT": E1}, {"endpoint": E1, "enabled": True}),
        ({}, {OTLP + "ENDPOINT": E1, OTLP + "TRACES_ENDPOINT": E2}, {"endpoint": E2}),
        ({"OTLP_ENDPOINT": E2}, {OTLP + "ENDPOINT": E1}, {"endpoint": E2, "enabled": True}),
        ({}, {OTLP + "ENDPOINT": E1, "OTEL_TRACES_EXPORTER": "none"}, {"enabled": False}),
        ({}, {OTLP + "ENDPOINT": E1, "OTEL_TRACES_EXPORTER": "otlp"}, {"enabled": True}),
        ({"TRACING_ENABLED": False}, {OTLP + "ENDPOINT": E1}, {"enabled": False}),
        ({"TRACING_ENABLED": True}, {}, {"enabled": True, "endpoint": "", "uses_tls": False}),
        ({"TRACING_ENABLED": True}, {"OTEL_SDK_DISABLED": "TRUE"}, {"enabled": False}),
        ({}, {"OTEL_SERVICE_NAME": "b", "OTEL_RESOURCE_ATTRIBUTES": ATTRIBUTES}, {"service_name": "b"}),
        ({}, {"OTEL_RESOURCE_ATTRIBUTES": ATTRIBUTES},
         {"service_name": "a", "service_version": "1.2", "environment": "prod", "sampling_rate": 0.1}),
        ({"SERVICE_NAME": "c", "ENVIRONMENT": "staging"}, {"OTEL_RESOURCE_ATTRIBUTES": ATTRIBUTES},
         {"service_name": "c", "service_version": "1.2", "environment": "staging"}),
        ({}, {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=old"}, {"environment": "old"}),
        ({}, {"OTEL_TRACES_SAMPLER_ARG": "0.2"}, {"sampling_rate": 0.2, "follows_caller": True}),
        ({}, {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.2"},
         {"sampling_rate": 0.2, "follows_caller": False}),
        ({"ENVIRONMENT": "prod"}, {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}, {"sampling_rate": 1.0}),
        ({}, {"OTEL_TRACES_SAMPLER": "always_off"}, {"sampling_rate": 0.0, "follows_caller": False}),
        ({}, {"OTEL_TRACES_SAMPLER": "Parentbased_Always_On"}, {"sampling_rate": 1.0, "follows_caller": True}),
        ({"SAMPLING_RATE": 0.0}, {"OTEL_TRACES_SAMPLER": "always_on"}, {"sampling_rate": 0.0}),
        ({}, {"OTEL_TRACES_SAMPLER": " "}, {"sampling_rate": 1.0}),
        ({}, {OTLP + "HEADERS": "a=1, b=x%3Dy"}, {"headers": {"a": "1", "b": "x=y"}}),
        ({}, {OTLP + "HEADERS": "a=1", OTLP + "TRACES_HEADERS": "c=2"}, {"headers": {"c": "2"}}),
        ({"OTLP_HEADERS": {"d": "3"}}, {OTLP + "HEADERS": "a=1"}, {"headers": {"d": "3"}}),
        ({}, {OTLP + "ENDPOINT": "https://x"}, {"uses_tls": True}),
        ({}, {OTLP + "ENDPOINT": E2, OTLP + "INSECURE": "false"}, {"uses_tls": True, "endpoint": "https://two:4317"}),
        ({}, {OTLP + "ENDPOINT": E2}, {"uses_tls": False}),
        ({}, {OTLP + "TIMEOUT": "7", OTLP + "COMPRESSION": "GZIP"}, {"timeout_seconds": 7, "compression": "gzip"}),
        ({}, {OTLP + "TIMEOUT": "7", OTLP + "TRACES_TIMEOUT": "8"}, {"timeout_seconds": 8}),
        ({}, {"OTEL_BSP_MAX_QUEUE_SIZE": "100", "OTEL_BSP_SCHEDULE_DELAY": "250"},
         {"queue_size": 100, "batch_size": 100, "delay_seconds": 0.25}),
        ({}, {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "9"}, {"queue_size": 2048, "batch_size": 9}),
    ],
)  # fmt: skip
def test_settings_win_over_variables(configured, given, variables, expected):
    config = configured(given, **variables)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "variables", "message"),
    [
        ({"SAMPLING_RATE": 1.5}, {}, "SAMPLING_RATE"),
        ({"SAMPLING_MODE": "tail"}, {}, "SAMPLING_MODE is 'tail': use keep_failed, ratio, collector"),
        ({}, {"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "OTEL_TRACES_SAMPLER is 'jaeger_remote'"),
        ({}, {"OTEL_TRACES_SAMPLER_ARG": "ten"}, "OTEL_TRACES_SAMPLER_ARG is 'ten'; it must be a number"),
        ({}, {"OTEL_TRACES_SAMPLER_ARG": "10"}, "OTEL_TRACES_SAMPLER_ARG is 10; it must be from 0 to 1"),
        ({}, {"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ({}, {"OTEL_SDK_DISABLED": "yes"}, "OTEL_SDK_DISABLED"),
        ({}, {OTLP + "PROTOCOL": "http/protobuf"}, "by grpc only"),
        ({}, {OTLP + "ENDPOINT": "ftp://x"}, "the OTLP endpoint is 'ftp://x'"),
        ({}, {OTLP + "ENDPOINT": "collector"}, "the OTLP endpoint is 'collector'"),
        ({}, {OTLP + "ENDPOINT": "http://collector:port"}, "the OTLP endpoint"),
        ({}, {OTLP + "ENDPOINT": "http://collector:4318/v1/traces"}, "the OTLP endpoint"),
        ({}, {OTLP + "ENDPOINT": E1, OTLP + "CERTIFICATE": "/ca.pem"}, "has no TLS"),
        ({}, {OTLP + "ENDPOINT": "https://x", OTLP + "CERTIFICATE": "/no/such/ca.pem"}, "cannot be used"),
        ({}, {OTLP + "ENDPOINT": "https://x", OTLP + "CLIENT_KEY": "/client.key"}, "needs its key"),
        ({}, {OTLP + "ENDPOINT": E1, OTLP + "COMPRESSION": "zstd"}, "'zstd'"),
        ({}, {OTLP + "HEADERS": "hush"}, "must be name=value pairs"),
        ({}, {OTLP + "ENDPOINT": E1, OTLP + "HEADERS": "a b=1"}, "'a b' is not one that gRPC can send"),
        ({}, {OTLP + "ENDPOINT": E1, OTLP + "HEADERS": "a=%0Ahush"}, "'a' is not one that gRPC can send"),
        ({}, {OTLP + "TIMEOUT": "10000"}, "it must be from 0.001 to 600 seconds"),
        ({}, {"OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "OTEL_BSP_MAX_QUEUE_SIZE"),
        ({}, {"OTEL_BSP_MAX_QUEUE_SIZE": "10", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "20"}, "do not fit"),
    ],
)
def test_nonsense_is_refused(configured, given, variables, message):
    with pytest.raises(ImproperlyConfigured, match=message) as raised:
        configured(given, **variables)
    assert "hush" not in str(raised.value)


@pytest.mark.needs_tool("openssl")
def test_certificates_are_looked_at(configured, tmp_path):
    made = Certificates(tmp_path / "made")
    files = {
        OTLP + "CERTIFICATE": str(made.ca),
        OTLP + "CLIENT_CERTIFICATE": str(made.client_certificate),
        OTLP + "CLIENT_KEY": str(made.client_key),
    }
    config = configured(**files, **{OTLP + "ENDPOINT": "collector:4317"})
    assert config.uses_tls  # which a bare host:port has only with a certificate
    with pytest.raises(ImproperlyConfigured, match="cannot be used"):
        configured(**{OTLP + "CLIENT_KEY": str(made.ca.with_suffix(".key"))})  # another one's
    with pytest.raises(ImproperlyConfigured, match="cannot be used"):
        configured(**{OTLP + "CLIENT_KEY": str(made.locked_client_key)})
    with pytest.raises(ImproperlyConfigured, match="cannot be used"):
        configured(**{**files, OTLP + "CERTIFICATE": str(made.client_key)})


def test_headers_do_not_show():
    config = TracingConfig(
        service_name="x", service_version="", environment="dev", endpoint="x:1", sampling_rate=1.0, enabled=True,
        headers={"Authorization": "hush"},
    )  # fmt: skip
    assert "hush" not in repr(config)
