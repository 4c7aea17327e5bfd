"""What the environment makes of the settings: production has no secret of its own, and nonsense is named."""

import os
import runpy
import subprocess
import sys

import pytest
from django.core.exceptions import ImproperlyConfigured

from voicehelper.services import BASE_DIR

KEY = "0123456789abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PRODUCTION = {"VOICEHELPER_ENV": "prod", "DJANGO_SECRET_KEY": KEY, "DJANGO_ALLOWED_HOSTS": "example.org"}


@pytest.fixture
def settings_of(monkeypatch):
    """The settings that some variables give, whatever those of the tests are."""

    def read(**environment):
        for name in list(os.environ):
            if name.startswith("DJANGO_") or name == "VOICEHELPER_ENV":
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(BASE_DIR / "voicehelper" / "settings.py"))

    return read


def test_production_is_https_only(settings_of):
    settings = settings_of(**PRODUCTION)
    assert settings["SECRET_KEY"] == KEY
    assert settings["SECURE_SSL_REDIRECT"] and settings["SESSION_COOKIE_SECURE"] and settings["CSRF_COOKIE_SECURE"]
    assert not settings["DEBUG"]


@pytest.mark.parametrize("environment", ["prod", "staging"])
@pytest.mark.parametrize("key", [{}, {"DJANGO_SECRET_KEY": ""}])
def test_there_is_no_secret_outside_development_but_one_s_own(settings_of, environment, key):
    with pytest.raises(ImproperlyConfigured, match="DJANGO_SECRET_KEY"):
        settings_of(VOICEHELPER_ENV=environment, **key)


def test_development_needs_no_secret(settings_of):
    assert settings_of()["SECRET_KEY"].startswith("dev-only-")


@pytest.mark.parametrize("environment", ["", "Prod", "production", "development"])
def test_an_environment_is_one_of_three(settings_of, environment):
    with pytest.raises(ImproperlyConfigured, match="VOICEHELPER_ENV"):
        settings_of(**{**PRODUCTION, "VOICEHELPER_ENV": environment})


def test_lists_are_taken_as_people_write_them(settings_of):
    lists = {
        "DJANGO_ALLOWED_HOSTS": "a.example.org, b.example.org,",
        "DJANGO_CSRF_TRUSTED_ORIGINS": "https://a.example.org, https://b.example.org",
    }
    settings = settings_of(**{**PRODUCTION, **lists})
    assert settings["ALLOWED_HOSTS"] == ["a.example.org", "b.example.org"]
    assert settings["CSRF_TRUSTED_ORIGINS"] == ["https://a.example.org", "https://b.example.org"]


@pytest.mark.parametrize(
    "name", ["DATABASE_CONN_MAX_AGE_SECONDS", "KAFKA_SESSION_TIMEOUT_MS", "KAFKA_REPLICATION_FACTOR"]
)
def test_numbers_are_read_strictly(settings_of, name):
    settings_of(**{name: ""})
    for text in ("many", "-1", "1.5", "²", "1" * 5000):
        with pytest.raises(ImproperlyConfigured, match=name):
            settings_of(**{name: text})


@pytest.mark.parametrize(
    ("change", "identity"),
    [({}, None), ({"DJANGO_ALLOWED_HOSTS": " "}, "security.W020"), ({"DJANGO_SECRET_KEY": "short"}, "security.W009")],
)
def test_the_deployment_check_of_production(change, identity):
    services = {
        "DATABASE_URL": "postgresql://127.0.0.1:1/unused",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "MILVUS_URI": "http://127.0.0.1:1",
    }
    done = subprocess.run(
        [sys.executable, "manage.py", "check", "--deploy", "--fail-level", "WARNING"],
        cwd=BASE_DIR,
        env={**os.environ, **services, **PRODUCTION, **change},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (identity is None), done.stderr
    assert (identity or "") in done.stderr


@pytest.fixture
def allow_origins(settings, settings_of):
    """Put into force what a value of CORS_ALLOWED_ORIGINS gives."""

    def allow(origins):
        made = settings_of(CORS_ALLOWED_ORIGINS=origins)
        for name in made:
            if name == "MIDDLEWARE" or name.startswith("CORS_"):
                setattr(settings, name, made[name])

    return allow


APP = "https://app.example.org"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, idempotency-key",
}


def test_pages_of_an_allowed_origin_may_use_the_api_with_a_token(allow_origins, client):
    allow_origins(f"{APP}, https://other.example.org")
    preflight = client.options("/api/v1/messages", headers={"Origin": APP, **PREFLIGHT})
    assert (preflight.status_code, preflight["Access-Control-Allow-Origin"]) == (200, APP)
    allowed = {name.strip() for name in preflight["Access-Control-Allow-Headers"].split(",")}
    assert {"authorization", "content-type", "idempotency-key", "if-match"} <= allowed
    answer = client.get("/api/v1/me", headers={"Origin": APP})
    assert (answer.status_code, answer["Access-Control-Allow-Origin"]) == (401, APP)
    assert "ETag" in answer["Access-Control-Expose-Headers"]
    assert not (
        preflight.has_header("Access-Control-Allow-Credentials")
        or answer.has_header("Access-Control-Allow-Credentials")
    )


@pytest.mark.parametrize(
    ("origins", "origin", "path"),
    [
        ("", APP, "/api/v1/me"),
        (APP, "https://app.example.org.evil.example", "/api/v1/me"),
        (APP, "http://app.example.org", "/api/v1/me"),
        (APP, "null", "/api/v1/me"),
        (APP, APP, "/healthz"),
    ],
)
def test_no_other_page_may(allow_origins, client, origins, origin, path):
    allow_origins(origins)
    for answer in (
        client.options(path, headers={"Origin": origin, **PREFLIGHT}),
        client.get(path, headers={"Origin": origin}),
    ):
        assert "Access-Control-Allow-Origin" not in answer
