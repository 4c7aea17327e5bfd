"""What an API token looks like, and how it is kept."""

import hashlib
import hmac
import re
import secrets
from uuid import UUID

SECRET_BYTES = 32
SHOWN_OF_AN_OLD_TOKEN = 8
_TOKEN = re.compile(r"vh_([0-9a-f]{32})_([A-Za-z0-9_-]{43})", re.ASCII)
_OLD_TOKEN = re.compile(r"[0-9a-f]{40}", re.ASCII)


def new_text(token_id: UUID) -> str:
    """Return a new token of this id, `vh_<id>_<secret>`. Nobody can make the same one again."""
    return f"{prefix_of(token_id)}_{secrets.token_urlsafe(SECRET_BYTES)}"


def prefix_of(token_id: UUID) -> str:
    """What a token begins with, which tells nothing of its secret."""
    return f"vh_{token_id.hex}"


def hash_of(text: str) -> str:
    """Return what is kept of a token: the SHA-256 of all of it, 64 hexadecimal digits.

    Not one of Django's password hashers. They are slow on purpose, tenths of a second, because passwords are guessed;
    a token is looked up with every request. Its secret is 256 random bits, which nobody guesses however fast the hash
    is, and equal secrets, against which a salt would help, do not occur.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def is_same_hash(one: str, other: str) -> bool:
    """Whether two hashes are equal, in a time that does not tell how much of them is."""
    return hmac.compare_digest(one, other)


def id_in(text: str) -> UUID | None:
    """The id that a token names; None: it is none of ours, or one from before, which names none."""
    match = _TOKEN.fullmatch(text)
    return UUID(match[1]) if match else None


def is_old(text: str) -> bool:
    """Whether it may be a token of rest_framework.authtoken: those were carried over and go on working."""
    return _OLD_TOKEN.fullmatch(text) is not None
