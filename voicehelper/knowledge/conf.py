"""The settings of the knowledge domain, which docs/knowledge.md lists: parsed once and strictly."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

MAX_CHUNK_CHARS = 8_000  # of four bytes each they still fit Milvus' longest text, 65,535 bytes
_MILVUS_SCHEMES = ("http", "https", "tcp", "unix")


@dataclass(frozen=True, kw_only=True)
class KnowledgeSettings:
    """What the variables above say. `embedding_model` is empty for the built-in embedder."""

    milvus_uri: str
    milvus_token: str = field(default="", repr=False)
    collection: str = "documents"
    embedding_base_url: str = ""
    embedding_model: str = ""
    embedding_api_key: str = field(default="", repr=False)
    embedding_dimension: int = 768
    embedding_batch_size: int = 64
    embedding_timeout_seconds: float = 30.0
    max_bytes: int = 10 * 1024 * 1024
    max_pages: int = 500
    max_chars: int = 10_000_000
    pdf_timeout_seconds: float = 30.0
    pdf_memory_mb: int = 512
    chunk_chars: int = 1200
    chunk_overlap_chars: int = 150
    search_timeout_seconds: float = 2.0

    def __post_init__(self) -> None:
        if not self.milvus_uri.endswith(".db") and urlsplit(self.milvus_uri).scheme not in _MILVUS_SCHEMES:
            raise ImproperlyConfigured("MILVUS_URI must be http://host:port, or a path that ends with .db")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", self.collection):
            raise ImproperlyConfigured("MILVUS_COLLECTION must be letters, digits and _, at most 100")
        if bool(self.embedding_base_url) != bool(self.embedding_model):
            raise ImproperlyConfigured("EMBEDDING_BASE_URL and EMBEDDING_MODEL need each other")
        address = urlsplit(self.embedding_base_url)
        if self.embedding_base_url and (address.scheme not in ("http", "https") or not address.hostname):
            raise ImproperlyConfigured("EMBEDDING_BASE_URL must begin with http:// or https:// and name a host")
        if self.chunk_overlap_chars > self.chunk_chars // 4:
            raise ImproperlyConfigured("CHUNK_OVERLAP_CHARS must be at most a quarter of CHUNK_CHARS")


def knowledge_from(environment: Mapping[str, str], *, milvus_uri: str) -> KnowledgeSettings:
    """Return the settings of what the environment says. `milvus_uri`: where Milvus is unless it says so.

    Raises ImproperlyConfigured, which names the variable and never a secret's value.
    """
    model = environment.get("EMBEDDING_MODEL", "")
    if model and not environment.get("EMBEDDING_DIMENSION"):
        raise ImproperlyConfigured("EMBEDDING_MODEL needs EMBEDDING_DIMENSION, the length of its vectors")
    return KnowledgeSettings(
        milvus_uri=environment.get("MILVUS_URI") or milvus_uri,
        milvus_token=_secret(environment, "MILVUS_TOKEN"),
        collection=environment.get("MILVUS_COLLECTION") or "documents",
        embedding_base_url=environment.get("EMBEDDING_BASE_URL", ""),
        embedding_model=model,
        embedding_api_key=_secret(environment, "EMBEDDING_API_KEY"),
        embedding_dimension=_whole(environment, "EMBEDDING_DIMENSION", 768, least=8, most=32_768),
        embedding_batch_size=_whole(environment, "EMBEDDING_BATCH_SIZE", 64, least=1, most=2048),
        embedding_timeout_seconds=_seconds(environment, "EMBEDDING_TIMEOUT_SECONDS", 30.0),
        max_bytes=_whole(environment, "DOCUMENT_MAX_BYTES", 10 * 1024 * 1024, least=1, most=100 * 1024 * 1024),
        max_pages=_whole(environment, "DOCUMENT_MAX_PAGES", 500, least=1, most=100_000),
        max_chars=_whole(environment, "DOCUMENT_MAX_CHARS", 10_000_000, least=1, most=100_000_000),
        pdf_timeout_seconds=_seconds(environment, "PDF_TIMEOUT_SECONDS", 30.0),
        pdf_memory_mb=_whole(environment, "PDF_MEMORY_MB", 512, least=128, most=65_536),
        chunk_chars=_whole(environment, "CHUNK_CHARS", 1200, least=100, most=MAX_CHUNK_CHARS),
        chunk_overlap_chars=_whole(environment, "CHUNK_OVERLAP_CHARS", 150, least=0, most=MAX_CHUNK_CHARS),
        search_timeout_seconds=_seconds(environment, "SEARCH_TIMEOUT_SECONDS", 2.0),
    )


def knowledge_settings() -> KnowledgeSettings:
    """`settings.KNOWLEDGE`, typed."""
    return settings.KNOWLEDGE


def _whole(environment: Mapping[str, str], name: str, default: int, *, least: int, most: int) -> int:
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 20) or not least <= int(text) <= most:
        raise ImproperlyConfigured(f"{name} is {text!r}; it must be a whole number from {least} to {most}")
    return int(text)


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds <= 600.0:
        raise ImproperlyConfigured(f"{name} is {text!r}; it must be seconds, above 0 and at most 600")
    return seconds


def _secret(environment: Mapping[str, str], name: str) -> str:
    """The variable, or what the file holds that `<name>_FILE` names."""
    value, path = environment.get(name, ""), environment.get(f"{name}_FILE", "")
    if value and path:
        raise ImproperlyConfigured(f"{name} and {name}_FILE are both set: which one is meant?")
    if not path:
        return value
    try:
        value = Path(path).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ImproperlyConfigured(f"{name}_FILE cannot be read: {type(error).__name__}") from None
    if not value:
        raise ImproperlyConfigured(f"{name}_FILE names an empty file")
    return value
