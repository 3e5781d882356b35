"""Where an endpoint is and how it is asked: configs, checked without the client's library.

The key is no part of them: it is read from the environment, in the process that sends the requests.
"""

from __future__ import annotations

import os
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from capfilt.config import Config
from capfilt.errors import RecipeError
from capfilt.redact import redact

NO_KEY = "none"
"""Sent where the environment has no key: servers of one's own ask for none."""


class EndpointConfig(Config):
    """What is sent to a captioner that is an endpoint (`--captioner openai:URL#MODEL`)."""

    side: int = Field(default=512, ge=16, le=8192)
    """Pixels of a picture's longer side as it is sent; a larger one is made smaller, a smaller one goes as it is."""
    quality: int = Field(default=90, ge=1, le=95)
    """Of the JPEG that is sent where a picture was made smaller, or is none that every server reads alike."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the server calls `vlm.max_new_tokens`; OpenAI's own newer models take the second alone."""


class RequestConfig(Config):
    """How an endpoint is asked: no part of plan and fingerprint. The key is read from the environment alone."""

    in_flight: int = Field(default=64, ge=1, le=4096)
    """Requests of one worker that are under way at a time."""
    deadline: float = Field(default=60, gt=0)
    """Seconds that one try of a request may take."""
    tries: int = Field(default=8, ge=1, le=100)
    """Tries of a request that is put off (429), fails (5xx) or is cut off; between them 1, 2, 4, ... seconds or as
    many as the server asks for (Retry-After), 60 at most. Where nothing else was answered meanwhile, nor a test picture
    is, the shard ends with an error."""
    key_variable: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable that holds the key, on every machine with a worker."""

    def key(self) -> str:
        """The key of this process. RecipeError where a variable was named and is not set."""
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.key_variable != RequestConfig.model_fields["key_variable"].default:
            raise RecipeError(
                f"requests.key_variable names {self.key_variable}, which is not set in the environment of this process;"
                " export it on every machine that works, or leave requests.key_variable out."
            )
        return key or NO_KEY


def split_address(text: str) -> tuple[str, str]:
    """URL and model of "URL#MODEL". RecipeError for another form, and for a URL that holds a secret."""
    url, _, model = text.partition("#")
    wanted = "give openai:http://HOST:8000/v1#MODEL"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RecipeError(f"openai:{redact(text)}: {error}; {wanted}.") from None
    if "@" in parts.netloc or parts.query or redact(url) != url:
        raise RecipeError(
            f"openai:{redact(text)}: the URL holds a password or parameters, and it is stored with the run: leave them"
            " out. The key belongs into the environment, as OPENAI_API_KEY or by requests.key_variable."
        )
    if parts.scheme not in ("http", "https") or not host or not model.strip() or any(c.isspace() for c in url):
        raise RecipeError(f"openai:{redact(text)}: no address of an endpoint and a model; {wanted}.")
    return url.rstrip("/"), model.strip()
