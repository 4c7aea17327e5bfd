"""Settings of the assistant: what may be said, and what makes no sense."""

import pytest
from django.core.exceptions import ImproperlyConfigured

from monitoring.conf import MonitoringSettings
from voicehelper.assistant.conf import PRICES, AssistantSettings, assistant_settings, llm_prices

ENDPOINT = {"LLM_BASE_URL": "https://llm.example.org/v1", "LLM_SIMPLE_MODEL": "small"}


def test_nothing_set_is_the_built_in_provider():
    assert assistant_settings({}) == AssistantSettings()
    assert assistant_settings({"LLM_BASE_URL": " ", "LLM_ROUTE": ""}) == AssistantSettings()
    assert AssistantSettings().base_url == ""


def test_an_endpoint():
    given = {**ENDPOINT, "LLM_COMPLEX_MODEL": "large", "LLM_API_KEY": "key", "LLM_PROVIDER": "vllm"}
    settings = assistant_settings({**given, "LLM_TIMEOUT_SECONDS": "2.5", "LLM_MAX_ATTEMPTS": "1", "OTHER": "x"})
    assert (settings.simple_model, settings.complex_model, settings.provider) == ("small", "large", "vllm")
    assert (settings.timeout_seconds, settings.max_attempts, settings.api_key) == (2.5, 1, "key")
    assert assistant_settings(ENDPOINT).complex_model == "small"


def test_the_rule_of_the_router():
    given = {"LLM_ROUTE": "complex", "LLM_COMPLEX_CHARS": "10", "LLM_COMPLEX_WORDS": " Why, step  ,"}
    settings = assistant_settings(given)
    assert (settings.route, settings.complex_chars, settings.complex_words) == ("complex", 10, ("why", "step"))


def test_a_key_from_a_file(tmp_path):
    file = tmp_path / "key"
    file.write_text("from a file\n")
    assert assistant_settings({**ENDPOINT, "LLM_API_KEY_FILE": str(file)}).api_key == "from a file"


def test_the_key_is_in_no_text():
    settings = assistant_settings({**ENDPOINT, "LLM_API_KEY": "top-secret"})
    assert "top-secret" not in f"{settings!r} {settings}"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LLM_BASE_URL": "https://llm.example.org/v1"}, "needs LLM_SIMPLE_MODEL"),
        ({**ENDPOINT, "LLM_BASE_URL": "llm.example.org"}, "LLM_BASE_URL must begin with"),
        ({**ENDPOINT, "LLM_BASE_URL": "ftp://llm"}, "LLM_BASE_URL must begin with"),
        ({**ENDPOINT, "LLM_BASE_URL": "http://[::1"}, "LLM_BASE_URL must begin with"),
        ({**ENDPOINT, "LLM_BASE_URL": "http://llm:port"}, "LLM_BASE_URL must begin with"),
        ({**ENDPOINT, "LLM_BASE_URL": "http://me:secret@llm"}, "no login"),
        ({**ENDPOINT, "LLM_SIMPLE_MODEL": "m" * 101}, "LLM_SIMPLE_MODEL must be"),
        ({**ENDPOINT, "LLM_API_KEY": "schlüssel"}, "LLM_API_KEY holds"),
        ({**ENDPOINT, "LLM_API_KEY": "a", "LLM_API_KEY_FILE": "/b"}, "both set"),
        ({**ENDPOINT, "LLM_API_KEY_FILE": "/no/such/file"}, "cannot be read: FileNotFoundError"),
        ({**ENDPOINT, "LLM_API_KEY_FILE": "/dev/null"}, "an empty file"),
        ({"LLM_API_KEY": "key"}, "LLM_API_KEY needs LLM_BASE_URL"),
        ({"LLM_SIMPLE_MODEL": "small"}, "LLM_SIMPLE_MODEL needs LLM_BASE_URL"),
        ({"LLM_ROUTE": "best"}, "LLM_ROUTE must be one of auto, simple, complex"),
        ({"LLM_COMPLEX_CHARS": "many"}, "LLM_COMPLEX_CHARS must be a whole number from 0"),
        ({"LLM_COMPLEX_CHARS": "1.5"}, "LLM_COMPLEX_CHARS must be a whole number"),
        ({"LLM_TIMEOUT_SECONDS": "0"}, "LLM_TIMEOUT_SECONDS must be a number from 0.1"),
        ({"LLM_TIMEOUT_SECONDS": "nan"}, "LLM_TIMEOUT_SECONDS must be a number"),
        ({"LLM_TIMEOUT_SECONDS": "90"}, "must not be more than LLM_REPLY_SECONDS"),
        ({"LLM_MAX_ATTEMPTS": "0"}, "LLM_MAX_ATTEMPTS must be"),
        ({"LLM_MAX_REPLIES": "0"}, "LLM_MAX_REPLIES must be a whole number from 1"),
        ({"LLM_OFFLINE_WORD_SECONDS": "-1"}, "LLM_OFFLINE_WORD_SECONDS must be"),
    ],
)
def test_what_makes_no_sense(environment, message):
    with pytest.raises(ImproperlyConfigured, match=message) as raised:
        assistant_settings(environment)
    assert "secret" not in str(raised.value) and "schlüssel" not in str(raised.value)


def test_prices():
    assert llm_prices({}) == PRICES
    own = llm_prices({"LLM_PRICES": '{"small": {"input": 1, "output": 2}, "gpt-4o": {"input": 3, "output": 4}}'})
    assert (own["small"], own["gpt-4o"]) == ({"input": 1, "output": 2}, {"input": 3, "output": 4})
    assert own["gpt-4o-mini"] == PRICES["gpt-4o-mini"]
    MonitoringSettings(llm_prices=own)
    for text, message in (("{", "not JSON"), ("[]", "must be like")):
        with pytest.raises(ImproperlyConfigured, match=message):
            llm_prices({"LLM_PRICES": text})
