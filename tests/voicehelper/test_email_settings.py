import pytest
from django.core.exceptions import ImproperlyConfigured

from voicehelper.email_settings import email_settings

FROM = {"EMAIL_FROM": "VoiceHelper <notify@example.com>"}


def settings_of(is_dev=False, **environment):
    return email_settings({**FROM, **environment}, is_dev=is_dev)


def login(settings):
    return settings.host, settings.port, settings.user, settings.password, settings.security


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("smtp://mail.example.com", ("mail.example.com", 25, "", "", "none")),
        ("smtp://mail.example.com:2525/", ("mail.example.com", 2525, "", "", "none")),
        ("smtp+tls://me:secret@mail.example.com", ("mail.example.com", 587, "me", "secret", "starttls")),
        ("smtps://me%40example.com:p%2Fw%3A%40@mail", ("mail", 465, "me@example.com", "p/w:@", "tls")),
        ("smtp://[::1]:26", ("::1", 26, "", "", "none")),
    ],
)
def test_a_url(url, expected):
    settings = settings_of(EMAIL_URL=url)
    assert settings.is_configured and settings.backend.endswith("smtp.EmailBackend")
    assert login(settings) == expected
    assert (settings.sender, settings.timeout_seconds) == ("VoiceHelper <notify@example.com>", 10)


def test_single_variables(tmp_path):
    file = tmp_path / "password"
    file.write_text("secret\n")
    common = {"EMAIL_HOST": "mail", "EMAIL_USER": "me", "EMAIL_SECURITY": "starttls"}
    expected = ("mail", 587, "me", "secret", "starttls")
    assert login(settings_of(**common, EMAIL_PASSWORD="secret")) == expected
    assert login(settings_of(**common, EMAIL_PASSWORD_FILE=str(file))) == expected
    assert login(settings_of(EMAIL_HOST="mail", EMAIL_PORT="26")) == ("mail", 26, "", "", "none")
    assert settings_of(EMAIL_HOST="mail", EMAIL_TIMEOUT_SECONDS="3").timeout_seconds == 3


def test_nothing_is_printed_in_development_and_not_made_elsewhere():
    dev, prod = email_settings({}, is_dev=True), email_settings({}, is_dev=False)
    assert dev.is_configured and dev.backend.endswith("console.EmailBackend")
    assert not prod.is_configured and prod.backend.endswith("dummy.EmailBackend")
    assert settings_of(EMAIL_URL="console://").backend.endswith("console.EmailBackend")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EMAIL_URL": "mail.example.com"}, "EMAIL_URL must begin with smtp://, smtp\\+tls://, smtps://, console://"),
        ({"EMAIL_URL": "http://mail"}, "EMAIL_URL must begin with"),
        ({"EMAIL_URL": "smtp://"}, "EMAIL_URL must look like"),
        ({"EMAIL_URL": "smtp://mail/path"}, "EMAIL_URL must look like"),
        ({"EMAIL_URL": "smtp://mail?tls=1"}, "EMAIL_URL must look like"),
        ({"EMAIL_URL": "smtp://mail:port"}, "EMAIL_URL is not a URL"),
        ({"EMAIL_URL": "smtps://me@mail"}, "needs both user and password"),
        ({"EMAIL_URL": "smtp://me:secret@mail"}, "over TLS alone"),
        ({"EMAIL_URL": "smtp://mail", "EMAIL_HOST": "mail"}, "EMAIL_URL and EMAIL_HOST are both set"),
        ({"EMAIL_PORT": "25"}, "EMAIL_PORT needs EMAIL_HOST"),
        ({"EMAIL_HOST": "mail", "EMAIL_PORT": "many"}, "EMAIL_PORT must be a whole number"),
        ({"EMAIL_HOST": "mail", "EMAIL_PORT": "70000"}, "EMAIL_PORT must be a whole number from 1 to 65535"),
        ({"EMAIL_HOST": "mail", "EMAIL_SECURITY": "ssl"}, "EMAIL_SECURITY must be one of none, starttls, tls"),
        ({"EMAIL_HOST": "mail", "EMAIL_TIMEOUT_SECONDS": "0"}, "EMAIL_TIMEOUT_SECONDS must be"),
        ({"EMAIL_HOST": "mail", "EMAIL_PASSWORD": "secret", "EMAIL_PASSWORD_FILE": "x"}, "are both set"),
        ({"EMAIL_HOST": "mail", "EMAIL_PASSWORD_FILE": "/nowhere"}, "EMAIL_PASSWORD_FILE cannot be read"),
        ({"EMAIL_HOST": "mail", "EMAIL_FROM": ""}, "EMAIL_FROM must name"),
        ({"EMAIL_HOST": "mail", "EMAIL_FROM": "nobody"}, "EMAIL_FROM must be an address"),
        ({"EMAIL_HOST": "mail", "EMAIL_FROM": "a@example.com, b@example.com"}, "EMAIL_FROM must be an address"),
        ({"EMAIL_HOST": "mail", "EMAIL_FROM": "a@example.com <b@example.com>"}, "EMAIL_FROM must be an address"),
        ({"EMAIL_URL": "smtps://me:secret%C3%9F@mail"}, "must be ASCII"),
        ({"EMAIL_HOST": "mail", "EMAIL_FROM": "a@example.com\r\nBcc: b@example.com"}, "EMAIL_FROM must be"),
    ],
)
def test_what_makes_no_sense_is_said_without_its_value(environment, message):
    with pytest.raises(ImproperlyConfigured, match=message) as refused:
        settings_of(**environment)
    assert "secret" not in str(refused.value)
