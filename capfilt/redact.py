"""Removes secrets from URLs: a password before a host, a signature or a token in a query string.

Anyone who can read a run folder, a page, a log or a cluster's list of jobs could use them, so a URL that is stored or
shown goes through `redact`. The rest still names the same object, so a command that is repeated with a new signature
counts as the same command. Redacting twice changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# Up to white space or the next URL of a list `a::b`; of a longer scheme its end is taken.
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{0,30})://((?:(?!::[\w+.-]+://|::/)[^\s\"<>`])*)")
_LEFT_OUT = re.compile(r"://\*\*\*@|://\S*[?&#]\*\*\*$")
_WEB = ("http", "https", "ftp", "ftps", "sftp", "ssh", "webdav", "webdavs")
# Names of parameters in which clouds, CDNs and APIs pass credentials.
_SECRET = re.compile(
    r"x-(amz|goog|oss|cos|obs|ms|tos|bce)-.*|(.*[-_.])?(sig|sign|signature|hmac|token|secret|password|passwd|passphrase"
    r"|pass|pwd|auth|authorization|credentials?|session|sessionid|jwt|policy|key|apikey)|.*(token|secret|password"
    r"|signature|apikey|accesskeyid|accessid|key-pair-id)",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"[^@\[:]*:(?!\d*$)[^@]*$")  # after the colon comes no port, and there is no "@" before
_SIGNATURE = re.compile(r"(.*[-_.])?(sig|sign|signature|hmac|policy)|.*signature", re.IGNORECASE)
# Parameters that a signature covers and that are new with each: times, and those of Azure.
_SIGNED = re.compile(
    r"(x-)?expir(es|y|ation)|e|exp|date|timestamp|nonce|sv|ss|srt|sr|sp|st|se|sip|spr|si|sdd|ses|sk[a-z]{1,3}|rsc[a-z]"
    r"|algorithm",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with *** for every secret in its URLs."""
    return _URL.sub(_redacted, text) if "://" in text else text


def is_redacted(address: str) -> bool:
    """Whether `redact` removed a secret from this URL."""
    return _LEFT_OUT.search(address) is not None


def redact_tree(value: Any) -> Any:
    """`redact` for all strings of a JSON value, keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_tree(key): redact_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(inner) for inner in value]
    return value


def _redacted(match: re.Match[str]) -> str:
    protocol, rest = match.groups()
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    if _PASSWORD.match(rest[:end]):  # a password may contain a slash, though it should not
        end = rest.find("@", end) + 1 or end
        end = min((at for at in (rest.find(sign, end) for sign in "/?#") if at >= 0), default=len(rest))
    authority, path = rest[:end], rest[end:]
    user, at, host = authority.rpartition("@")
    # In `abfs://container@account` and `git://user@host` it is part of the name; for a web server it is a credential.
    if at and user != HIDDEN and (":" in user or protocol.lower() in _WEB):
        authority = f"{HIDDEN}@{host}"
    path, hash_, fragment = path.partition("#")
    path, mark, query = path.partition("?")
    return f"{protocol}://{authority}{path}{mark}{_parameters(query)}{hash_}{_parameters(fragment)}"


def _parameters(text: str) -> str:
    """A query string without its secrets; the other parameters stay in their order."""
    if "=" not in text:
        return text
    pieces = text.split("&")
    names = [piece.partition("=")[0].replace("%2D", "-").replace("%2d", "-") for piece in pieces]
    signed = any(_SIGNATURE.fullmatch(name) for name in names)
    kept = [
        piece
        for name, piece in zip(names, pieces, strict=True)
        if not _SECRET.fullmatch(name) and not (signed and _SIGNED.fullmatch(name))
    ]
    return text if len(kept) == len(pieces) else "&".join([*kept, HIDDEN])
