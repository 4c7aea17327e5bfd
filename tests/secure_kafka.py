"""A second Apache Kafka, as a careful operator runs it: TLS, SASL with four mechanisms, and ACLs.

Certificates, passwords and signing keys are made for the run, with the program openssl.
"""

import base64
import http.server
import json
import secrets
import subprocess
import threading
import time
import urllib.parse

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from tests.services import TOPICS, free_ports
from voicehelper.devstack.apache_kafka import ApacheKafka

AUDIENCE = "voicehelper-kafka"
MODULES = "org.apache.kafka.common.security"
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")


class SecureKafka:
    """One node with three doors for clients.

    `bootstrap_servers`: no security, the super user's; tests set up and read with it. `sasl_servers`: SASL over
    TLS. `tls_servers`: TLS that demands a client certificate. Users other than the super user may do what an ACL
    allows them, and nothing else.
    """

    def __init__(self, directory, output):
        port, controller_port, sasl_port, tls_port = free_ports(4)
        directory.mkdir(parents=True)
        self.certificates = Certificates(directory / "tls")
        self.tokens = TokenIssuer(directory / "oauth")
        self.plain_password = secrets.token_urlsafe(16)
        self.sasl_servers, self.tls_servers = f"127.0.0.1:{sasl_port}", f"127.0.0.1:{tls_port}"
        listeners = f"PLAINTEXT://127.0.0.1:{port},SASL_SSL://{self.sasl_servers},SSL://{self.tls_servers}"
        scram = f"{MODULES}.scram.ScramLoginModule required;"
        self._broker = ApacheKafka(
            directory / "kafka",
            port,
            controller_port=controller_port,
            output=output,
            jvm_options=[f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={self.tokens.jwks_url}"],
            properties={
                "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller_port}",
                "advertised.listeners": listeners,
                "listener.security.protocol.map": (
                    "PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL,CONTROLLER:PLAINTEXT"
                ),
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(self.certificates.server_keystore),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self.certificates.ca),
                "listener.name.ssl.ssl.client.auth": "required",
                "sasl.enabled.mechanisms": ",".join(MECHANISMS),
                "listener.name.sasl_ssl.plain.sasl.jaas.config": (
                    f'{MODULES}.plain.PlainLoginModule required user_plain="{self.plain_password}";'
                ),
                "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": scram,
                "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": scram,
                "listener.name.sasl_ssl.oauthbearer.sasl.jaas.config": (
                    f"{MODULES}.oauthbearer.OAuthBearerLoginModule required;"
                ),
                "listener.name.sasl_ssl.oauthbearer.sasl.server.callback.handler.class": (
                    f"{MODULES}.oauthbearer.OAuthBearerValidatorCallbackHandler"
                ),
                "listener.name.sasl_ssl.oauthbearer.sasl.oauthbearer.jwks.endpoint.url": self.tokens.jwks_url,
                "listener.name.sasl_ssl.oauthbearer.sasl.oauthbearer.expected.audience": AUDIENCE,
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                # Whoever comes in without a name: the broker itself, its controller, and the tests.
                "super.users": "User:ANONYMOUS",
                # A failed login is answered after this; tests fail on purpose and often.
                "connection.failed.authentication.delay.ms": "20",
            },
        )
        self.bootstrap_servers = self._broker.bootstrap_servers
        self.pause, self.resume = self._broker.pause, self._broker.resume

    def start(self):
        """Start it; returns when it answers and the product's topics are there."""
        self._broker.start()
        self._broker.wait_until_ready()
        self.admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        self.create_topics(*TOPICS)

    def stop(self):
        self._broker.kill()
        self.tokens.close()

    def create_topics(self, *names, partitions=6, **config):
        """`config`: as `max_message_bytes="5000"`."""
        config = {name.replace("_", "."): value for name, value in config.items()}
        new = [NewTopic(name, num_partitions=partitions, replication_factor=1, config=config) for name in names]
        _wait(self.admin.create_topics(new))

    def configure_topic(self, name, **config):
        resource = ConfigResource(
            ConfigResource.Type.TOPIC,
            name,
            incremental_configs=[
                ConfigEntry(key.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
                for key, value in config.items()
            ],
        )
        _wait(self.admin.incremental_alter_configs([resource]))

    # -- who may come in -----------------------------------------------------------------------------------------

    def set_password(self, user, password, mechanism=ScramMechanism.SCRAM_SHA_512):
        """Make the SCRAM user, or give it another password; returns when the broker asks for that one."""
        info = ScramCredentialInfo(mechanism, 4096)
        _wait(self.admin.alter_user_scram_credentials([UserScramCredentialUpsertion(user, info, password.encode())]))
        name = "SCRAM-SHA-512" if mechanism == ScramMechanism.SCRAM_SHA_512 else "SCRAM-SHA-256"
        self._until(lambda: can_connect(self.login(user, password, name)))

    def login(self, user, password, mechanism="SCRAM-SHA-512"):
        """Client settings of a user with a password."""
        return {
            "bootstrap.servers": self.sasl_servers,
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.certificates.ca),
            "sasl.mechanisms": mechanism,
            "sasl.username": user,
            "sasl.password": password,
        }

    # -- what they may do ----------------------------------------------------------------------------------------

    def allow(self, user, *topics, operations=(AclOperation.WRITE,), kind=ResourceType.TOPIC):
        """Allow a user to write (or as said) to topics; returns when the broker goes by it."""
        _wait(self.admin.create_acls(self._bindings(user, topics, operations, kind)))
        self._until(lambda: all(self._has(binding) for binding in self._bindings(user, topics, operations, kind)))

    def forbid(self, user, *topics, operations=(AclOperation.WRITE,), kind=ResourceType.TOPIC):
        """Take back what `allow()` gave."""
        _wait(self.admin.delete_acls([_filter(b) for b in self._bindings(user, topics, operations, kind)]))
        self._until(lambda: not any(self._has(binding) for binding in self._bindings(user, topics, operations, kind)))

    def forbid_for_a_moment(self, user, *topics):
        """Forbid to write, and allow it again as soon as the broker has taken that."""
        bindings = self._bindings(user, topics, (AclOperation.WRITE,), ResourceType.TOPIC)
        _wait(self.admin.delete_acls([_filter(binding) for binding in bindings]))
        self.allow(user, *topics)

    def _bindings(self, user, names, operations, kind):
        return [
            AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW)
            for name in names
            for operation in operations
        ]

    def _has(self, binding):
        return bool(self.admin.describe_acls(_filter(binding)).result(30))

    def _until(self, condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "the broker did not take it in time"
            time.sleep(0.02)


def can_connect(settings):
    """Whether the broker lets a client in."""
    try:
        AdminClient({**settings, "log_level": 0, "error_cb": lambda _: None}).list_topics(timeout=2)
    except Exception:
        return False
    return True


def _filter(b):
    return AclBindingFilter(
        b.restype, b.name, b.resource_pattern_type, b.principal, b.host, b.operation, b.permission_type
    )


def _wait(futures):
    for future in futures.values():
        future.result(timeout=30)


class Certificates:
    """A certificate authority, what it signed for the broker and for a client, and another authority."""

    def __init__(self, directory):
        directory.mkdir()
        self._directory = directory
        self.ca = self._authority("ca")
        self.other_ca = self._authority("other")
        key, certificate = self._signed("server", "subjectAltName=IP:127.0.0.1")
        self.server_keystore = directory / "server-keystore.pem"
        self.server_keystore.write_text(key.read_text() + certificate.read_text())
        self.client_key, self.client_certificate = self._signed("client", "extendedKeyUsage=clientAuth")
        self.client_key_password = secrets.token_urlsafe(16)
        self.locked_client_key = directory / "client-locked.key"
        self._run("pkcs8", "-topk8", "-in", self.client_key, "-out", self.locked_client_key,
                  "-passout", f"pass:{self.client_key_password}")  # fmt: skip

    def _authority(self, name):
        certificate = self._directory / f"{name}.pem"
        self._run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                  "-keyout", certificate.with_suffix(".key"), "-out", certificate)  # fmt: skip
        return certificate

    def _signed(self, name, extension):
        key, request, certificate = (self._directory / f"{name}.{end}" for end in ("key", "csr", "pem"))
        extensions = self._directory / f"{name}.ext"
        extensions.write_text(extension)
        self._run("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        self._run("x509", "-req", "-days", "2", "-in", request, "-CA", self.ca, "-CAkey", self.ca.with_suffix(".key"),
                  "-CAcreateserial", "-extfile", extensions, "-out", certificate)  # fmt: skip
        return key, certificate

    def _run(self, *arguments):
        _openssl(*arguments)


class TokenIssuer:
    """An OAuth token endpoint (client credentials) on loopback, whose public key the broker reads from a file.

    `is_out_of_order`: it gives no token. A wrong client secret it echoes, as careless ones do.
    """

    def __init__(self, directory):
        directory.mkdir()
        self._key = directory / "signing.key"
        _openssl("genrsa", "-out", self._key, "2048")
        modulus = bytes.fromhex(_openssl("rsa", "-in", self._key, "-noout", "-modulus").decode().strip().split("=")[1])
        key = {"kty": "RSA", "kid": "k1", "use": "sig", "alg": "RS256", "n": _base64(modulus), "e": "AQAB"}
        jwks = directory / "jwks.json"
        jwks.write_text(json.dumps({"keys": [key]}))
        self.jwks_url = jwks.as_uri()
        self.client_id, self.client_secret = "oauth", secrets.token_urlsafe(16)
        self.is_out_of_order = False
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def token(self, subject, lifetime_seconds=300):
        """A signed token and when it expires, as `oauth_cb` returns it."""
        now = int(time.time())
        expires = now + lifetime_seconds
        header = {"alg": "RS256", "typ": "JWT", "kid": "k1"}
        claims = {"sub": subject, "iss": "tests", "aud": AUDIENCE, "iat": now, "exp": expires, "scope": "kafka"}
        signed = ".".join(_base64(json.dumps(part).encode()) for part in (header, claims))
        signature = _openssl("dgst", "-sha256", "-sign", self._key, input=signed.encode())
        return f"{signed}.{_base64(signature)}", float(expires)

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(issuer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                client = base64.b64decode(self.headers["Authorization"].partition(" ")[2]).decode()
                client_id, _, secret = client.partition(":")
                if issuer.is_out_of_order:
                    # Not 503, which librdkafka tries again for 20 s before it says anything.
                    status, answer = 400, {"error": "temporarily_unavailable"}
                elif (client_id, secret) != (issuer.client_id, issuer.client_secret):
                    status, answer = 401, {"error": "invalid_client", "error_description": f"not the secret: {secret}"}
                else:
                    assert form["grant_type"] == ["client_credentials"]
                    token, _ = issuer.token(issuer.client_id)
                    status, answer = 200, {"access_token": token, "token_type": "Bearer", "expires_in": 300}
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler


def _base64(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _openssl(*arguments, input=None):
    return subprocess.run(["openssl", *map(str, arguments)], input=input, capture_output=True, check=True).stdout
