"""What a server says of itself: asked once, by the driver, before any shard is begun.

A model behind an endpoint has no weights to take a fingerprint of. What it has is its name, its entry in the list of
models, a version (vLLM and SGLang have /version) and the `system_fingerprint` of its answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from capfilt.config import Config
from capfilt.errors import RunError, did_you_mean
from capfilt.inference.captioners.endpoint.client import Answer, EndpointClient
from capfilt.inference.captioners.endpoint.requests import probe_request, sampling
from capfilt.inference.config import AnnotateConfig
from capfilt.printable import printable

_TIMES = ("created", "permission", "object")  # of an entry in the list of models: new at each start, or each answer


class ServerReport(Config):
    """What decides, as far as a server says, which texts its model writes."""

    entry: dict[str, str] = {}
    """Of the model, in the list of models."""
    version: str = ""
    system_fingerprint: str = ""
    honours_seeds: bool = True
    """False where a test picture was described in two ways with one seed."""


def ask_server(url: str, model: str, config: AnnotateConfig) -> ServerReport:
    """Ask a server what it is, and have it describe a test picture twice with one seed.

    Raises:
        RunError: it cannot be reached, or does not answer such requests; the message says what it said.
    """
    fields = sampling(config)
    with _client(url, model, config) as client:
        listed, version = _entries(client.get("/models")), _version(client)
        try:
            one, two = (client.submit(probe_request(fields, seed=1), "", _keep).result() for _ in range(2))
        except RunError as error:
            if listed and model not in listed:
                near = did_you_mean(model, listed) or f" It lists: {', '.join(sorted(listed)[:8])}."
                raise RunError(f"{url} has no model {model}.{near}") from error
            raise
    return ServerReport(
        entry=listed.get(model, {}),
        version=version,
        system_fingerprint=one.fingerprint,
        honours_seeds=one.text == two.text,
    )


def listed_now(url: str, model: str, config: AnnotateConfig) -> ServerReport:
    """The part of the report that costs nothing. RunError where the server cannot be reached."""
    with _client(url, model, config) as client:
        return ServerReport(entry=_entries(client.get("/models")).get(model, {}), version=_version(client))


@contextmanager
def _client(url: str, model: str, config: AnnotateConfig) -> Iterator[EndpointClient]:
    quick = config.requests.model_copy(update={"tries": min(2, config.requests.tries)})
    client = EndpointClient(url, model, quick, probe_request(sampling(config)))
    try:
        yield client
    finally:
        client.close()


def _version(client: EndpointClient) -> str:
    """What vLLM and SGLang say at /version; "" for a server without."""
    parts = urlsplit(client.url)
    tree = client.get(f"{parts.scheme}://{parts.netloc}/version")
    version = tree.get("version") if isinstance(tree, Mapping) else None
    return printable(version) if isinstance(version, str) else ""


def _entries(tree: Any) -> dict[str, dict[str, str]]:
    """The models that a server lists, by name, each with what it says of them as texts."""
    entries = tree.get("data") if isinstance(tree, Mapping) else None
    listed = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    return {
        printable(entry["id"]): {
            printable(name): printable(value)
            for name, value in list(entry.items())[:32]
            if name not in _TIMES and isinstance(value, str | int)
        }
        for entry in listed[:10_000]
        if isinstance(entry.get("id"), str)
    }


async def _keep(_answer: Answer) -> None:
    """A test is kept nowhere."""
