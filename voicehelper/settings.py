"""Settings of VoiceHelper. Every value an operator may change comes from the environment: see README, Settings."""

import os
from typing import Any

import dj_database_url
from corsheaders.defaults import default_headers
from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static

from voicehelper.assistant.conf import assistant_settings, llm_prices
from voicehelper.email_settings import email_settings
from voicehelper.identity.conf import tenant_requests_per_minute
from voicehelper.kafka_security import kafka_security
from voicehelper.knowledge.conf import knowledge_from
from voicehelper.services import BASE_DIR, DATA_DIR, find_services


def _names(variable: str, default: str = "") -> list[str]:
    return [name.strip() for name in os.environ.get(variable, default).split(",") if name.strip()]


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ImproperlyConfigured(f"{variable}={text[:50]!r} must be a whole number")
    return int(text)


ENVIRONMENT = os.environ.get("VOICEHELPER_ENV", "dev")
if ENVIRONMENT not in ("dev", "staging", "prod"):
    raise ImproperlyConfigured(f"VOICEHELPER_ENV={ENVIRONMENT[:50]!r} must be dev, staging or prod")
IS_DEV = ENVIRONMENT == "dev"
DEBUG = False

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or ("dev-only-" + "x" * 50 if IS_DEV else "")
if not SECRET_KEY:
    raise ImproperlyConfigured(f"VOICEHELPER_ENV={ENVIRONMENT} needs a DJANGO_SECRET_KEY, long and random")
ALLOWED_HOSTS = _names("DJANGO_ALLOWED_HOSTS", "127.0.0.1,localhost,[::1]" if IS_DEV else "")
SECRET_KEY_FALLBACKS = _names("DJANGO_SECRET_KEY_FALLBACKS")
CSRF_TRUSTED_ORIGINS = _names("DJANGO_CSRF_TRUSTED_ORIGINS")
if not IS_DEV:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_SSL_REDIRECT = True
    SECURE_HSTS_SECONDS = 31_536_000
    SECURE_HSTS_INCLUDE_SUBDOMAINS = True
    SECURE_HSTS_PRELOAD = True
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True

INSTALLED_APPS = [
    "voicehelper.console",  # before unfold, some of whose templates and files it replaces
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_prometheus",
    "monitoring",
    "events_outbox",
    "voicehelper",
    "voicehelper.identity",
    "voicehelper.idempotency",
    "voicehelper.conversations",
    "voicehelper.knowledge",
    "voicehelper.notifications",
    "voicehelper.analytics",
    "voicehelper.audit",
]

MIDDLEWARE = [
    "monitoring.middleware.MonitoringMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "csp.middleware.CSPMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "voicehelper.caching.ApiCachingMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

# Pages of these origins may use the API, with a token: cookies do not go with their requests.
CORS_ALLOWED_ORIGINS = _names("CORS_ALLOWED_ORIGINS")
if CORS_ALLOWED_ORIGINS:
    INSTALLED_APPS.append("corsheaders")
    # After the redirect to https.
    MIDDLEWARE.insert(MIDDLEWARE.index("csp.middleware.CSPMiddleware"), "corsheaders.middleware.CorsMiddleware")
    CORS_URLS_REGEX = r"^/api/"
    _read_by_api = ["idempotency-key", "if-match", "if-none-match", "x-correlation-id", "traceparent", "tracestate"]
    CORS_ALLOW_HEADERS = [*default_headers, *_read_by_api, "baggage"]
    CORS_EXPOSE_HEADERS = ["ETag", "Idempotency-Replayed", "Location", "Retry-After", "X-Correlation-ID"]

# Nothing from elsewhere, nothing inline, no eval: also the admin.
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "form-action": ["'self'"],
        "base-uri": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
}

ROOT_URLCONF = "voicehelper.urls"
WSGI_APPLICATION = "voicehelper.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

SERVICES = find_services()
DATABASES: dict[str, Any] = {
    "default": dj_database_url.parse(
        SERVICES.database_url or "postgresql://localhost/voicehelper",
        conn_max_age=_number("DATABASE_CONN_MAX_AGE_SECONDS", 60),
        conn_health_checks=True,
    )
}
# A database whose host is gone is noticed within seconds, not after the system's many minutes.
_timeouts = {"connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
_timeouts["tcp_user_timeout"] = 10_000  # ms: a host that is gone amid a statement
DATABASES["default"]["OPTIONS"] = {**_timeouts, **DATABASES["default"].get("OPTIONS", {})}
# What web processes share, where there is a Redis. A request waits for one that does not answer no longer than this.
REDIS_URL = os.environ.get("REDIS_URL", "")
_redis = {
    "BACKEND": "monitoring.caches.RedisCache",
    "LOCATION": REDIS_URL,
    "KEY_PREFIX": "voicehelper",
    "OPTIONS": {"socket_connect_timeout": 0.25, "socket_timeout": 0.25},  # seconds
}
# Large enough that nobody makes a throttle's count be forgotten by asking with many other names.
_memory: dict[str, Any] = {"BACKEND": "monitoring.caches.LocMemCache", "OPTIONS": {"MAX_ENTRIES": 10_000}}
CACHES: dict[str, Any] = {
    "default": _redis if REDIS_URL else {**_memory, "LOCATION": "default"},
    # Of each process alone, for when the shared one is away.
    "process": {**_memory, "LOCATION": "process"},
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# EMAIL_URL or single variables, EMAIL_FROM: see voicehelper/email_settings.py.
_email = email_settings(os.environ, is_dev=IS_DEV)
EMAIL_IS_CONFIGURED = _email.is_configured
EMAIL_BACKEND, EMAIL_TIMEOUT, DEFAULT_FROM_EMAIL = _email.backend, _email.timeout_seconds, _email.sender
EMAIL_HOST, EMAIL_PORT, EMAIL_HOST_USER, EMAIL_HOST_PASSWORD = _email.host, _email.port, _email.user, _email.password
EMAIL_USE_TLS, EMAIL_USE_SSL = _email.security == "starttls", _email.security == "tls"

LOGIN_URL = "admin:login"
LOGIN_REDIRECT_URL = "admin:index"
AUTH_USER_MODEL = "identity.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.NumericPasswordValidator"},
]

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
# In development the files are served from the apps; elsewhere `collectstatic` puts them here.
STATIC_ROOT = None if IS_DEV else BASE_DIR / "staticfiles"
WHITENOISE_USE_FINDERS = IS_DEV
WHITENOISE_AUTOREFRESH = False

UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "VoiceHelper",
    "SITE_HEADER": "VoiceHelper",
    "SITE_SYMBOL": "monitor_heart",
    "SITE_FAVICONS": [
        {"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("console/icon.svg")},
    ],
    "DASHBOARD_CALLBACK": "voicehelper.console.views.overview_page",
    "SIDEBAR": {"navigation": "voicehelper.console.navigation.navigation"},
}

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "voicehelper.identity.authentication.ApiTokenAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": [
        "voicehelper.identity.permissions.IsTenantMember",
        "voicehelper.identity.permissions.HasScope",
    ],
    "DEFAULT_THROTTLE_CLASSES": ["voicehelper.identity.throttling.TenantThrottle"],
    "DEFAULT_PAGINATION_CLASS": "voicehelper.pagination.NewestFirst",
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["voicehelper.parsers.JSONParser"],
    "EXCEPTION_HANDLER": "voicehelper.problems.problem_response",
    "DEFAULT_SCHEMA_CLASS": "voicehelper.openapi.Operation",
    "URL_FORMAT_OVERRIDE": None,  # the form of an answer is asked for with Accept alone
    "PAGE_SIZE": 50,
}
SPECTACULAR_SETTINGS: dict[str, Any] = {
    "TITLE": "VoiceHelper",
    "VERSION": "1.0.0",  # of the API, not of the service
    "DESCRIPTION": (
        "Log in at `/api/v1/auth/token`, or make a token, and send it as `Authorization: Token vh_...` (`Bearer` does, "
        "too); a browser that is logged in at the admin site needs none. Errors are problem details (RFC 9457). Lists "
        "come in pages: go on at `next`. Every answer has an `X-Correlation-ID`: the request's own, if it has one."
    ),
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "AUTHENTICATION_WHITELIST": ["voicehelper.identity.authentication.ApiTokenAuthentication"],
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_AUTHENTICATION": [],
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_NAME_OVERRIDES": {
        "UserRoleEnum": "voicehelper.identity.models.User.Role",
        "MessageRoleEnum": "voicehelper.conversations.models.Message.Role",
        "TokenStateEnum": "voicehelper.identity.models.ApiToken.State",
        "DeliveryStateEnum": "voicehelper.notifications.models.Delivery.State",
        "KindEnum": "voicehelper.notifications.serializers.KIND_CHOICES",
    },
    # Nothing from elsewhere: the page's files are the sidecar's, and nobody else's validator is asked.
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "SWAGGER_UI_SETTINGS": {"deepLinking": True, "validatorUrl": None},
}
# Of all users of a tenant together; 0 is no limit.
TENANT_REQUESTS_PER_MINUTE = tenant_requests_per_minute(os.environ)

_session_ms = _number("KAFKA_SESSION_TIMEOUT_MS", 10_000)
EVENTS_OUTBOX: dict[str, Any] = {
    "KAFKA": {"bootstrap.servers": SERVICES.kafka_bootstrap_servers, **kafka_security(os.environ)},
    "KAFKA_IS_EMBEDDED": SERVICES.kafka_is_embedded,
    # A consumer that died keeps its partitions for so long; a live one says so from a thread of its own.
    "KAFKA_CONSUMER": {"session.timeout.ms": _session_ms, "heartbeat.interval.ms": _session_ms // 4},
    "ADMIN_TENANT": "voicehelper.console.roles.admin_tenant",
    "ACKS": os.environ.get("KAFKA_ACKS", "all"),
    "TOPIC_REPLICATION_FACTOR": _number("KAFKA_REPLICATION_FACTOR", 1),
}

# A day of a tenant is alerted when it comes to three times the average day, and to at least so much.
ANALYTICS: dict[str, Any] = {
    "BUDGET_MIN_COST_DOLLARS": os.environ.get("BUDGET_ALERT_MIN_COST_DOLLARS", "1"),
    "BUDGET_MIN_TOKENS": os.environ.get("BUDGET_ALERT_MIN_TOKENS", "100000"),
}
KNOWLEDGE = knowledge_from(os.environ, milvus_uri=SERVICES.milvus_uri or str(DATA_DIR / "milvus.db"))

MONITORING: dict[str, Any] = {
    "SERVICE_NAME": os.environ.get("OTEL_SERVICE_NAME", "voicehelper"),
    "SERVICE_VERSION": os.environ.get("VOICEHELPER_VERSION", "0.1.0"),
    "ENVIRONMENT": ENVIRONMENT,
    "LOG_FORMAT": os.environ.get("LOG_FORMAT", "auto"),  # auto: text in a terminal, else json
    "LOG_LEVEL": os.environ.get("LOG_LEVEL", "INFO"),
    # keep_failed | ratio | collector; where spans go and how many: the standard OTEL_* variables.
    "SAMPLING_MODE": os.environ.get("SAMPLING_MODE", "keep_failed"),
}
MONITORING["LLM_PRICES"] = llm_prices(os.environ)
# Who answers in conversations: docs/assistant.md.
ASSISTANT = assistant_settings(os.environ)
# For the admin: figures over time, and links to traces.
MONITORING["PROMETHEUS_URL"] = os.environ.get("PROMETHEUS_URL", "")
MONITORING["JAEGER_URL"] = os.environ.get("JAEGER_URL", "")
# Where docs/ is served, for the admin's links to the runbook; Prometheus takes the same variable.
DOCS_URL = os.environ.get("DOCS_URL", "")
if "TRACING_ENABLED" in os.environ:
    MONITORING["TRACING_ENABLED"] = os.environ["TRACING_ENABLED"].lower() == "true"
# monitoring configures logging itself (one line format for web, relay and consumers).
LOGGING_CONFIG = None
