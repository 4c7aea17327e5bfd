"""How clients log in to Kafka: from the environment (README, Settings) to librdkafka's names."""

from collections.abc import Mapping
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_PASSWORD_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_MECHANISMS = (*_PASSWORD_MECHANISMS, "OAUTHBEARER")

_TLS = {
    "KAFKA_SSL_CA_LOCATION": "ssl.ca.location",
    "KAFKA_SSL_CERTIFICATE_LOCATION": "ssl.certificate.location",
    "KAFKA_SSL_KEY_LOCATION": "ssl.key.location",
    "KAFKA_SSL_KEY_PASSWORD": "ssl.key.password",
}
_PASSWORD = {
    "KAFKA_SASL_USERNAME": "sasl.username",
    "KAFKA_SASL_PASSWORD": "sasl.password",
}
_OAUTH = {
    "KAFKA_OAUTH_TOKEN_ENDPOINT_URL": "sasl.oauthbearer.token.endpoint.url",
    "KAFKA_OAUTH_CLIENT_ID": "sasl.oauthbearer.client.id",
    "KAFKA_OAUTH_CLIENT_SECRET": "sasl.oauthbearer.client.secret",
    "KAFKA_OAUTH_SCOPE": "sasl.oauthbearer.scope",
}
_OPTIONAL = {"KAFKA_OAUTH_SCOPE"}
_SECRETS = {"KAFKA_SASL_PASSWORD", "KAFKA_SSL_KEY_PASSWORD", "KAFKA_OAUTH_CLIENT_SECRET"}
"""Each may come from a file instead, as containers get their secrets: `<NAME>_FILE`."""


def kafka_security(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the librdkafka settings of what the environment says; none of it set gives none.

    Raises ImproperlyConfigured, which names the variable and never its value, for what makes no sense together.
    """
    given = _given(environment)
    protocol = given.pop("KAFKA_SECURITY_PROTOCOL", "PLAINTEXT").upper()
    if protocol not in _PROTOCOLS:
        raise ImproperlyConfigured(f"KAFKA_SECURITY_PROTOCOL must be one of {', '.join(_PROTOCOLS)}")
    settings = {} if protocol == "PLAINTEXT" else {"security.protocol": protocol}

    tls = _take(given, _TLS)
    if tls and not protocol.endswith("SSL"):
        raise ImproperlyConfigured(f"{min(tls)} needs KAFKA_SECURITY_PROTOCOL to be SSL or SASL_SSL")
    _need_each_other(tls, "KAFKA_SSL_CERTIFICATE_LOCATION", "KAFKA_SSL_KEY_LOCATION")
    if "KAFKA_SSL_KEY_PASSWORD" in tls and "KAFKA_SSL_KEY_LOCATION" not in tls:
        raise ImproperlyConfigured("KAFKA_SSL_KEY_PASSWORD needs KAFKA_SSL_KEY_LOCATION")
    settings |= {_TLS[name]: value for name, value in tls.items()}

    if protocol.startswith("SASL"):
        settings |= _sasl(given)
    elif given:
        raise ImproperlyConfigured(f"{min(given)} needs KAFKA_SECURITY_PROTOCOL to be SASL_SSL (or SASL_PLAINTEXT)")
    return settings


def _sasl(given: dict[str, str]) -> dict[str, str]:
    mechanism = given.pop("KAFKA_SASL_MECHANISM", "").upper()
    if mechanism not in _MECHANISMS:
        raise ImproperlyConfigured(f"KAFKA_SASL_MECHANISM must be one of {', '.join(_MECHANISMS)}")
    names = _PASSWORD if mechanism in _PASSWORD_MECHANISMS else _OAUTH
    login = _take(given, names)
    if given:
        raise ImproperlyConfigured(f"{min(given)} makes no sense with KAFKA_SASL_MECHANISM={mechanism}")
    if missing := names.keys() - login.keys() - _OPTIONAL:
        raise ImproperlyConfigured(f"KAFKA_SASL_MECHANISM={mechanism} needs {min(missing)}")
    settings = {"sasl.mechanisms": mechanism, **{names[name]: value for name, value in login.items()}}
    if mechanism == "OAUTHBEARER":
        settings["sasl.oauthbearer.method"] = "oidc"
    return settings


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set and not empty; a secret also from its file."""
    names = {"KAFKA_SECURITY_PROTOCOL", "KAFKA_SASL_MECHANISM", *_TLS, *_PASSWORD, *_OAUTH}
    given = {name: environment[name] for name in names if environment.get(name)}
    for name in _SECRETS:
        path = environment.get(f"{name}_FILE")
        if not path:
            continue
        if name in given:
            raise ImproperlyConfigured(f"{name} and {name}_FILE are both set: which one is meant?")
        try:
            given[name] = Path(path).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ImproperlyConfigured(f"{name}_FILE cannot be read: {type(error).__name__}") from None
        if not given[name]:
            raise ImproperlyConfigured(f"{name}_FILE names an empty file")
    return given


def _take(given: dict[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {name: given.pop(name) for name in names if name in given}


def _need_each_other(given: Mapping[str, str], one: str, other: str) -> None:
    for name, partner in ((one, other), (other, one)):
        if name in given and partner not in given:
            raise ImproperlyConfigured(f"{name} needs {partner}")
