import pytest
from django.core.exceptions import ImproperlyConfigured

from voicehelper.knowledge.conf import knowledge_from

URI = "http://127.0.0.1:19530"


def test_by_default_nothing_has_to_be_said():
    conf = knowledge_from({}, milvus_uri="data/milvus.db")
    assert conf.milvus_uri == "data/milvus.db"
    assert (conf.max_bytes, conf.embedding_model, conf.search_timeout_seconds) == (10 * 1024 * 1024, "", 2.0)


def test_the_environment_is_followed():
    environment = {
        "MILVUS_URI": "https://milvus.example:19530",
        "MILVUS_TOKEN": "root:Milvus",
        "EMBEDDING_BASE_URL": "http://llm:8080/v1",
        "EMBEDDING_MODEL": "small",
        "EMBEDDING_DIMENSION": "1536",
        "CHUNK_CHARS": "800",
        "SEARCH_TIMEOUT_SECONDS": "0.5",
    }
    conf = knowledge_from(environment, milvus_uri=URI)
    assert (conf.milvus_uri, conf.milvus_token) == ("https://milvus.example:19530", "root:Milvus")
    assert (conf.embedding_model, conf.embedding_dimension) == ("small", 1536)
    assert (conf.chunk_chars, conf.search_timeout_seconds) == (800, 0.5)
    assert "root:Milvus" not in repr(conf)


def test_secrets_may_come_from_files(tmp_path):
    file = tmp_path / "key"
    file.write_text("the-key\n")
    assert knowledge_from({"EMBEDDING_API_KEY_FILE": str(file)}, milvus_uri=URI).embedding_api_key == "the-key"
    with pytest.raises(ImproperlyConfigured, match="MILVUS_TOKEN and MILVUS_TOKEN_FILE"):
        knowledge_from({"MILVUS_TOKEN": "x", "MILVUS_TOKEN_FILE": str(file)}, milvus_uri=URI)
    with pytest.raises(ImproperlyConfigured, match="MILVUS_TOKEN_FILE cannot be read"):
        knowledge_from({"MILVUS_TOKEN_FILE": str(tmp_path / "none")}, milvus_uri=URI)
    file.write_text("\n")
    with pytest.raises(ImproperlyConfigured, match="empty file"):
        knowledge_from({"MILVUS_TOKEN_FILE": str(file)}, milvus_uri=URI)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MILVUS_URI": "localhost:19530"}, "MILVUS_URI"),
        ({"MILVUS_URI": "/data/milvus"}, "MILVUS_URI"),
        ({"MILVUS_COLLECTION": "a-b"}, "MILVUS_COLLECTION"),
        ({"EMBEDDING_BASE_URL": "http://llm/v1"}, "EMBEDDING_MODEL need"),
        ({"EMBEDDING_MODEL": "small", "EMBEDDING_DIMENSION": "8"}, "EMBEDDING_BASE_URL"),
        ({"EMBEDDING_MODEL": "small", "EMBEDDING_BASE_URL": "http://llm"}, "EMBEDDING_DIMENSION"),
        (
            {"EMBEDDING_MODEL": "small", "EMBEDDING_BASE_URL": "llm", "EMBEDDING_DIMENSION": "8"},
            "EMBEDDING_BASE_URL must begin",
        ),
        ({"EMBEDDING_DIMENSION": "1e3"}, "EMBEDDING_DIMENSION"),
        ({"EMBEDDING_DIMENSION": "4"}, "EMBEDDING_DIMENSION"),
        ({"DOCUMENT_MAX_BYTES": "-1"}, "DOCUMENT_MAX_BYTES"),
        ({"DOCUMENT_MAX_BYTES": "9" * 5_000}, "DOCUMENT_MAX_BYTES"),
        ({"CHUNK_CHARS": "9000"}, "CHUNK_CHARS"),
        ({"CHUNK_OVERLAP_CHARS": "301"}, "CHUNK_OVERLAP_CHARS"),
        ({"SEARCH_TIMEOUT_SECONDS": "0"}, "SEARCH_TIMEOUT_SECONDS"),
        ({"SEARCH_TIMEOUT_SECONDS": "nan"}, "SEARCH_TIMEOUT_SECONDS"),
        ({"PDF_TIMEOUT_SECONDS": "soon"}, "PDF_TIMEOUT_SECONDS"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(environment, says):
    with pytest.raises(ImproperlyConfigured, match=says):
        knowledge_from(environment, milvus_uri=URI)
