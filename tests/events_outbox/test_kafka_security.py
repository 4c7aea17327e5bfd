"""Logging in to Kafka in every supported way, what happens when that fails, and that no secret is ever shown."""

import json
import logging
import os
import random
import secrets
import subprocess
import sys
import time

import pytest
from confluent_kafka.admin import AclOperation, ResourceType, ScramMechanism
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.views.debug import SafeExceptionReporterFilter

from events_outbox import Consumer, handlers, kafka
from events_outbox.conf import outbox_settings
from events_outbox.consumer import ConsumerProcess
from events_outbox.models import OutboxEvent, RelayCursor, UndeliverableEvent
from events_outbox.record_search import find_records
from events_outbox.relay import Relay
from events_outbox.status import read_status
from tests.events_outbox.conftest import eventually, in_thread
from tests.services import free_ports
from tests.topics import TopicReader
from voicehelper.identity.models import User
from voicehelper.kafka_security import kafka_security
from voicehelper.services import BASE_DIR

needs_broker = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.apache_kafka,
    pytest.mark.needs_tool("openssl"),
]


def on_secure_broker(test):
    for mark in needs_broker:
        test = mark(test)
    return test


# -- environment -----------------------------------------------------------------------------------------------------

SCRAM = {
    "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
    "KAFKA_SASL_USERNAME": "u",
    "KAFKA_SASL_PASSWORD": "S3cret-value",
}
OAUTH = {
    "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    "KAFKA_SASL_MECHANISM": "OAUTHBEARER",
    "KAFKA_OAUTH_TOKEN_ENDPOINT_URL": "https://issuer/token",
    "KAFKA_OAUTH_CLIENT_ID": "id",
    "KAFKA_OAUTH_CLIENT_SECRET": "S3cret-value",
}
CERTIFICATE = {"KAFKA_SSL_CERTIFICATE_LOCATION": "/c", "KAFKA_SSL_KEY_LOCATION": "/k"}


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"KAFKA_SECURITY_PROTOCOL": "plaintext", "KAFKA_SASL_PASSWORD": ""}, {}),
        (
            {"KAFKA_SECURITY_PROTOCOL": "ssl", "KAFKA_SSL_CA_LOCATION": "/ca", **CERTIFICATE},
            {
                "security.protocol": "SSL",
                "ssl.ca.location": "/ca",
                "ssl.certificate.location": "/c",
                "ssl.key.location": "/k",
            },
        ),
        (
            SCRAM,
            {
                "security.protocol": "SASL_SSL",
                "sasl.mechanisms": "SCRAM-SHA-512",
                "sasl.username": "u",
                "sasl.password": "S3cret-value",
            },
        ),
        (
            OAUTH,
            {
                "security.protocol": "SASL_SSL",
                "sasl.mechanisms": "OAUTHBEARER",
                "sasl.oauthbearer.method": "oidc",
                "sasl.oauthbearer.token.endpoint.url": "https://issuer/token",
                "sasl.oauthbearer.client.id": "id",
                "sasl.oauthbearer.client.secret": "S3cret-value",
            },
        ),
    ],
)
def test_the_environment_becomes_client_settings(environment, expected):
    assert kafka_security(environment) == expected


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": "S3cret-value"}, "KAFKA_SECURITY_PROTOCOL must be one of PLAINTEXT, SSL"),
        (without(SCRAM, "KAFKA_SECURITY_PROTOCOL"), "KAFKA_SASL_MECHANISM needs KAFKA_SECURITY_PROTOCOL"),
        ({"KAFKA_SSL_CA_LOCATION": "S3cret-value"}, "KAFKA_SSL_CA_LOCATION needs KAFKA_SECURITY_PROTOCOL"),
        (
            {**SCRAM, "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SSL_CA_LOCATION": "S3cret-value"},
            "KAFKA_SSL_CA_LOCATION needs",
        ),
        (without(SCRAM, "KAFKA_SASL_MECHANISM"), "KAFKA_SASL_MECHANISM must be one of PLAIN, SCRAM-SHA-256"),
        ({**SCRAM, "KAFKA_SASL_MECHANISM": "S3cret-value"}, "KAFKA_SASL_MECHANISM must be one of"),
        (without(SCRAM, "KAFKA_SASL_USERNAME"), "needs KAFKA_SASL_USERNAME"),
        (without(SCRAM, "KAFKA_SASL_PASSWORD"), "needs KAFKA_SASL_PASSWORD"),
        ({**SCRAM, "KAFKA_OAUTH_CLIENT_SECRET": "S3cret-value"}, "KAFKA_OAUTH_CLIENT_SECRET makes no sense with"),
        ({**OAUTH, "KAFKA_SASL_PASSWORD": "S3cret-value"}, "KAFKA_SASL_PASSWORD makes no sense with"),
        (without(OAUTH, "KAFKA_OAUTH_TOKEN_ENDPOINT_URL"), "needs KAFKA_OAUTH_TOKEN_ENDPOINT_URL"),
        ({**SCRAM, "KAFKA_SECURITY_PROTOCOL": "SSL"}, "KAFKA_SASL_MECHANISM needs KAFKA_SECURITY_PROTOCOL"),
        ({**SCRAM, **without(CERTIFICATE, "KAFKA_SSL_KEY_LOCATION")}, "_LOCATION needs KAFKA_SSL_KEY_LOCATION"),
        ({**SCRAM, **without(CERTIFICATE, "KAFKA_SSL_CERTIFICATE_LOCATION")}, "needs KAFKA_SSL_CERTIFICATE_LOCATION"),
        ({**SCRAM, "KAFKA_SSL_KEY_PASSWORD": "S3cret-value"}, "KAFKA_SSL_KEY_PASSWORD needs KAFKA_SSL_KEY_LOCATION"),
        ({**SCRAM, "KAFKA_SASL_PASSWORD_FILE": "/S3cret-value"}, "both set"),
        (
            {**without(SCRAM, "KAFKA_SASL_PASSWORD"), "KAFKA_SASL_PASSWORD_FILE": "/S3cret-value"},
            "KAFKA_SASL_PASSWORD_FILE cannot be read: FileNotFoundError",
        ),
    ],
)
def test_nonsense_names_the_variable_and_never_its_value(environment, says):
    with pytest.raises(ImproperlyConfigured, match=says) as raised:
        kafka_security(environment)
    assert "S3cret-value" not in str(raised.value)


@pytest.mark.parametrize("name", ["KAFKA_SASL_PASSWORD", "KAFKA_SSL_KEY_PASSWORD", "KAFKA_OAUTH_CLIENT_SECRET"])
def test_a_secret_may_come_from_a_file(tmp_path, name):
    file = tmp_path / "secret"
    file.write_text(" from a file \n")
    environment = {**SCRAM, **CERTIFICATE} if name != "KAFKA_OAUTH_CLIENT_SECRET" else OAUTH
    given = kafka_security({**without(environment, name), f"{name}_FILE": str(file)})
    assert " from a file " in given.values()
    file.write_text("\n")
    with pytest.raises(ImproperlyConfigured, match=f"{name}_FILE names an empty file"):
        kafka_security({**without(environment, name), f"{name}_FILE": str(file)})


# -- every way to log in ---------------------------------------------------------------------------------------------


def log_in(settings, client_settings, **others):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": client_settings, **others}


def by_environment(broker, **environment):
    """Client settings as the product takes them from its environment."""
    tls = {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SSL_CA_LOCATION": str(broker.certificates.ca)}
    return {"bootstrap.servers": broker.sasl_servers, **kafka_security({**tls, **environment})}


def by_password(mechanism):
    def settings_for(broker):
        name, password = f"user-{random.randrange(10**9)}", secrets.token_urlsafe()
        if mechanism == "PLAIN":
            name, password = "plain", broker.plain_password
        else:
            broker.set_password(name, password, ScramMechanism[mechanism.replace("-", "_")])
        environment = {"KAFKA_SASL_USERNAME": name, "KAFKA_SASL_PASSWORD": password}
        return name, by_environment(broker, KAFKA_SASL_MECHANISM=mechanism, **environment)

    return settings_for


def by_oauth_endpoint(broker):
    return broker.tokens.client_id, by_environment(
        broker,
        KAFKA_SASL_MECHANISM="OAUTHBEARER",
        KAFKA_OAUTH_TOKEN_ENDPOINT_URL=broker.tokens.url,
        KAFKA_OAUTH_CLIENT_ID=broker.tokens.client_id,
        KAFKA_OAUTH_CLIENT_SECRET=broker.tokens.client_secret,
        KAFKA_OAUTH_SCOPE="kafka",
    )


def oauth_settings(broker, oauth_cb):
    return {
        "bootstrap.servers": broker.sasl_servers,
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": str(broker.certificates.ca),
        "sasl.mechanisms": "OAUTHBEARER",
        "oauth_cb": oauth_cb,
    }


issue_token = None
"""What the dotted path below names, while a test runs."""


def by_oauth_function(broker):
    global issue_token
    name = f"user-{random.randrange(10**9)}"

    def issue_token(_config):
        return broker.tokens.token(name)

    return name, oauth_settings(broker, f"{__name__}.issue_token")


def by_client_certificate(broker):
    certificates = broker.certificates
    environment = {
        "KAFKA_SECURITY_PROTOCOL": "SSL",
        "KAFKA_SSL_CA_LOCATION": str(certificates.ca),
        "KAFKA_SSL_CERTIFICATE_LOCATION": str(certificates.client_certificate),
        "KAFKA_SSL_KEY_LOCATION": str(certificates.locked_client_key),
        "KAFKA_SSL_KEY_PASSWORD": certificates.client_key_password,
    }
    return "CN=client", {"bootstrap.servers": broker.tls_servers, **kafka_security(environment)}


@pytest.fixture
def consumer():
    """A consumer that keeps what it handled, in a group of its own; gone after the test."""
    name = f"secure-{random.randrange(10**9)}"
    handled = []
    consumer = Consumer(name, group_id=f"{name}-group")
    consumer.handles("conversation.created")(lambda event: handled.append(event.aggregate_id))
    consumer.handled = handled
    yield consumer
    del handlers._consumers[name]


def allow_all(broker, user, topics, group=None):
    broker.allow(user, *topics, operations=(AclOperation.WRITE, AclOperation.READ, AclOperation.CREATE))
    if group:
        broker.allow(user, group, operations=(AclOperation.READ,), kind=ResourceType.GROUP)


@on_secure_broker
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(by_password("PLAIN"), id="PLAIN"),
        pytest.param(by_password("SCRAM-SHA-256"), id="SCRAM-SHA-256"),
        pytest.param(by_password("SCRAM-SHA-512"), id="SCRAM-SHA-512"),
        pytest.param(by_oauth_endpoint, id="OAuth endpoint"),
        pytest.param(by_oauth_function, id="OAuth function"),
        pytest.param(by_client_certificate, id="client certificate"),
    ],
)
def test_topics_relay_and_consumer_log_in(secure_kafka, settings, emit, consumer, way):
    user, client_settings = way(secure_kafka)
    topic = f"conversation.{random.randrange(10**9)}.events"
    log_in(settings, client_settings, TOPICS={"conversation": topic})
    allow_all(secure_kafka, user, [topic, "default.events"], consumer.group_id)
    call_command("create_topics")
    for number in range(3):
        emit(f"c{number}")
    eventually(lambda: (Relay().run(until_empty=True), not UndeliverableEvent.objects.exists())[1])
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: sorted(consumer.handled) == ["c0", "c1", "c2"])


# -- a login that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def topic(secure_kafka, settings):
    """A topic of the test's own for conversations; the other domains have none."""
    name = f"conversation.{random.randrange(10**9)}.events"
    secure_kafka.create_topics(name)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "TOPICS": {"conversation": name}, "DEFAULT_TOPIC": name}
    return name


@pytest.fixture
def user(secure_kafka, topic, consumer):
    """A broker user with the password "right-password" who may do what the tests do."""
    name = f"user-{random.randrange(10**9)}"
    secure_kafka.set_password(name, "right-password")
    allow_all(secure_kafka, name, [topic], consumer.group_id)
    return name


@pytest.fixture
def published(secure_kafka, emit, topic):
    """Put an event into the topic, as the super user, and return its aggregate."""

    def published(settings, aggregate):
        theirs = settings.EVENTS_OUTBOX
        settings.EVENTS_OUTBOX = {**theirs, "KAFKA": {"bootstrap.servers": secure_kafka.bootstrap_servers}}
        emit(aggregate)
        Relay().run(until_empty=True)
        settings.EVENTS_OUTBOX = theirs
        return aggregate

    return published


@on_secure_broker
def test_a_consumer_with_a_wrong_password_waits_says_so_and_recovers(
    secure_kafka, settings, user, consumer, published, caplog
):
    published(settings, "c1")
    log_in(settings, secure_kafka.login(user, "changed-password"))
    with in_thread(ConsumerProcess(consumer)) as thread:
        eventually(lambda: any("Authentication failed" in str(record.__dict__) for record in caplog.records))
        assert thread.is_alive() and consumer.handled == []
        secure_kafka.set_password(user, "changed-password")
        eventually(lambda: consumer.handled == ["c1"])


@on_secure_broker
@pytest.mark.parametrize("kind", [ResourceType.GROUP, ResourceType.TOPIC])
def test_a_consumer_without_permission_waits_says_so_and_recovers(
    secure_kafka, settings, user, topic, consumer, published, caplog, kind
):
    published(settings, "c1")
    log_in(settings, secure_kafka.login(user, "right-password"))
    name = topic if kind == ResourceType.TOPIC else consumer.group_id
    secure_kafka.forbid(user, name, operations=(AclOperation.READ,), kind=kind)
    with in_thread(ConsumerProcess(consumer)) as thread:
        eventually(lambda: any("uthorization" in str(record.__dict__) for record in caplog.records))
        assert thread.is_alive() and consumer.handled == []
        secure_kafka.allow(user, name, operations=(AclOperation.READ,), kind=kind)
        eventually(lambda: consumer.handled == ["c1"], 40)


@on_secure_broker
def test_permissions_it_takes_to_find_a_record(secure_kafka, settings, topic, emit, published):
    published(settings, "found")
    event = OutboxEvent.objects.latest("id")
    looker = f"looker-{random.randrange(10**9)}"
    secure_kafka.set_password(looker, "right-password")
    log_in(settings, secure_kafka.login(looker, "right-password"))
    assert "authoriz" in find_records(event).not_known
    secure_kafka.allow(looker, topic, operations=(AclOperation.READ,))  # and nothing of a group
    found = eventually(lambda: find_records(event).records)
    assert len(found) == 1
    assert not find_records(event).not_known


@on_secure_broker
def test_the_reason_of_a_failed_login_is_not_talked_over(secure_kafka, settings, user):
    """That all brokers are down is passed on only where librdkafka says nothing else."""

    def told_within(seconds, client_settings):
        log_in(settings, client_settings)
        told = []
        client = kafka.make_producer(lambda error: told.append(error.name()))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            client.poll(0.1)
        return set(told)

    assert told_within(3, secure_kafka.login(user, "wrong-password")) == {"_AUTHENTICATION"}
    assert told_within(2, {"bootstrap.servers": secure_kafka.sasl_servers}) == {"_ALL_BROKERS_DOWN"}


@on_secure_broker
def test_create_topics_says_at_once_that_the_login_failed(secure_kafka, settings, user):
    log_in(settings, secure_kafka.login(user, "wrong-password"))
    with pytest.raises(CommandError, match="Authentication failed"):
        call_command("create_topics")
    log_in(settings, {**secure_kafka.login(user, "x"), "ssl.ca.location": str(secure_kafka.certificates.other_ca)})
    with pytest.raises(CommandError, match="certificate verify failed"):
        call_command("create_topics")


def test_create_topics_says_which_setting_is_wrong(settings):
    log_in(settings, {"bootstrap.servers": "x:1", "sasl.pasword": "S3cret-value"})
    with pytest.raises(CommandError, match=r"sasl\.pasword") as raised:
        call_command("create_topics")
    assert "S3cret-value" not in str(raised.value)


@on_secure_broker
def test_create_topics_says_why_the_broker_is_not_reached(settings):
    log_in(settings, {"bootstrap.servers": f"127.0.0.1:{free_ports(1)[0]}"})
    with pytest.raises(kafka.KafkaException, match="Connection refused"):
        kafka.create_topics(timeout_seconds=2)


@on_secure_broker
@pytest.mark.parametrize("by", ["endpoint", "function"])
def test_a_token_that_cannot_be_had_is_waited_for(secure_kafka, settings, topic, emit, by, caplog):
    tokens = secure_kafka.tokens
    if by == "endpoint":
        user, client_settings = by_oauth_endpoint(secure_kafka)
    else:
        user = f"user-{random.randrange(10**9)}"

        def get_token(_config):
            if tokens.is_out_of_order:
                raise ConnectionError("temporarily_unavailable")
            return tokens.token(user)

        client_settings = oauth_settings(secure_kafka, get_token)
    allow_all(secure_kafka, user, [topic])
    log_in(settings, client_settings)
    tokens.is_out_of_order = True
    try:
        with in_thread(Relay()):
            emit("c1")
            eventually(lambda: RelayCursor.read().last_error not in ("", "waiting for the broker"))
            assert "temporarily_unavailable" in "".join(str(record.__dict__) for record in caplog.records)
            assert read_status().pending == 1 and not UndeliverableEvent.objects.exists()
            tokens.is_out_of_order = False
            eventually(lambda: read_status().pending == 0, 40)
    finally:
        tokens.is_out_of_order = False
    assert not UndeliverableEvent.objects.exists()
    reader = TopicReader(secure_kafka.bootstrap_servers, [topic], from_start=True)
    assert len(reader.read(1)) == 1
    reader.close()


@pytest.mark.parametrize(
    ("oauth_cb", "says"),
    [
        ("no.such.function", "No module"),
        ("json.nothing", "nothing"),
        (7, "dotted path"),
        ("json.__name__", "dotted"),
    ],
)
def test_a_token_function_that_is_none_is_a_clear_error(settings, oauth_cb, says):
    log_in(settings, {"bootstrap.servers": "x:1", "oauth_cb": oauth_cb})
    with pytest.raises(ImproperlyConfigured, match=says):
        kafka.make_producer(lambda error: None)


# -- secrets ---------------------------------------------------------------------------------------------------------


@on_secure_broker
@pytest.mark.parametrize("is_right", [True, False])
def test_a_relays_output_status_and_admin_show_no_password(secure_kafka, topic, user, emit, is_right, tmp_path):
    password = f"Pa55word-{secrets.token_hex(8)}"
    secure_kafka.set_password(user, password if is_right else "another")
    file = tmp_path / "password"
    file.write_text(password + "\n")
    environment = {
        **os.environ,
        "DATABASE_URL": os.environ["DATABASE_URL"].rpartition("/")[0] + f"/{connection.settings_dict['NAME']}",
        "KAFKA_BOOTSTRAP_SERVERS": secure_kafka.sasl_servers,
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "KAFKA_SASL_USERNAME": user,
        "KAFKA_SASL_PASSWORD_FILE": str(file),
        "KAFKA_SSL_CA_LOCATION": str(secure_kafka.certificates.ca),
        "LOG_LEVEL": "DEBUG",
    }
    emit("c1")
    log = tmp_path / "relay.log"
    with log.open("wb") as output:
        command = [sys.executable, "manage.py", "relay_outbox"]
        relay = subprocess.Popen(command, cwd=BASE_DIR, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        if is_right:
            eventually(lambda: read_status().leader and read_status().pending == 0)
        else:
            eventually(lambda: "Authentication failed" in RelayCursor.read().last_error)
    finally:
        relay.terminate()
        relay.wait(20)
    said = log.read_text()
    assert "this relay leads" in said and relay.returncode == 0
    assert is_right or "Authentication failed" in said
    status = subprocess.run(
        [sys.executable, "manage.py", "outbox_status"], cwd=BASE_DIR, env=environment, capture_output=True, text=True
    )
    assert status.returncode == 0, status.stderr
    alice = Client()
    alice.force_login(User.objects.create_superuser("alice", password="x"))
    page = alice.get(reverse("admin:events_outbox_relaycursor_change", args=[1])).content.decode()
    assert is_right or ("Authentication failed" in page and "Authentication failed" in status.stdout)
    for shown in (said, status.stdout, status.stderr, page):
        assert password not in shown


@on_secure_broker
def test_librdkafkas_debug_log_shows_no_secret(secure_kafka, settings, topic, user, emit, caplog):
    caplog.set_level(logging.DEBUG)
    client_id, oauth = by_oauth_endpoint(secure_kafka)
    allow_all(secure_kafka, client_id, [topic])  # an idempotent producer without any right fails at once
    for client_settings in (secure_kafka.login(user, "right-password"), oauth):
        log_in(settings, {**client_settings, "debug": "all"})
        client = kafka.make_producer(lambda error: None)
        client.list_topics(timeout=10)
        client.poll(0.2)
        del client
    said = "".join(record.getMessage() for record in caplog.records)
    assert "SCRAM" in said and "OAUTHBEARER" in said
    for secret in ("right-password", secure_kafka.tokens.client_secret):
        assert secret not in said


@on_secure_broker
def test_a_secret_that_others_echo_is_taken_out(secure_kafka, settings, topic, emit, caplog):
    """Whoever issues tokens may answer with what it was sent."""
    caplog.set_level(logging.DEBUG)
    _, client_settings = by_oauth_endpoint(secure_kafka)
    wrong = f"wrong-{secrets.token_hex(8)}"
    log_in(settings, {**client_settings, "sasl.oauthbearer.client.secret": wrong, "debug": "security"})
    with in_thread(Relay()):
        emit("c1")
        last_error = eventually(lambda: (e := RelayCursor.read().last_error) and "not the secret" in e and e)
    said = json.dumps([str(record.__dict__) for record in caplog.records])
    assert "not the secret" in said
    assert wrong not in said and wrong not in last_error


def test_settings_that_are_shown_or_refused_show_no_secret(settings):
    secret = "S3cret-value"
    names = (
        "sasl.password",
        "ssl.key.password",
        "ssl.key.pem",
        "ssl.keystore.password",
        "sasl.oauthbearer.client.secret",
        "sasl.oauthbearer.config",
    )
    sensitive = dict.fromkeys(names, secret)
    kafka_settings = {"bootstrap.servers": "x:1", **sensitive}
    log_in(settings, kafka_settings, KAFKA_PRODUCER=sensitive, KAFKA_CONSUMER=sensitive)
    shown = [repr(outbox_settings()), str(SafeExceptionReporterFilter().get_safe_settings()["EVENTS_OUTBOX"])]
    assert "x:1" in shown[1]

    log_in(settings, {**kafka_settings, "security.protocol": secret})  # librdkafka's own message has the value
    with pytest.raises(ImproperlyConfigured, match=r"security\.protocol") as refused:
        kafka.make_producer(lambda error: None)
    shown.append(str(refused.value))

    settings.EVENTS_OUTBOX = {"KAFKA": [kafka_settings], "ACKS": "all"}
    with pytest.raises(ImproperlyConfigured, match="'KAFKA'") as refused:
        outbox_settings()
    shown.append(str(refused.value))
    assert not [text for text in shown if secret in text]
