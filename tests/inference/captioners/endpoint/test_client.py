from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from endpoint_server import EndpointServer

from capfilt.errors import RecipeError, RunError
from capfilt.inference.captioners.endpoint import client as module
from capfilt.inference.captioners.endpoint.client import MAX_WAIT, Answer, EndpointClient
from capfilt.inference.captioners.endpoint.config import RequestConfig
from capfilt.inference.captioners.endpoint.requests import probe_request, sampling
from capfilt.inference.config import AnnotateConfig

KEY = "sk-hunter2hunter2"
FIELDS = sampling(AnnotateConfig())
Ask = Callable[..., Answer]


async def keep(_answer: Answer) -> None:
    pass


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EndpointClient]]:
    """Clients whose first wait is short."""
    monkeypatch.setattr(module, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made: list[EndpointClient] = []

    def new(endpoint: EndpointServer, **settings: Any) -> EndpointClient:
        config = RequestConfig.model_validate({"tries": 3, "deadline": 60, **settings})
        made.append(EndpointClient(endpoint.url, "tiny", config, probe_request(FIELDS)))
        return made[-1]

    yield new
    for client in made:
        client.close()


def ask(client: EndpointClient, *script: str, endpoint: EndpointServer, seed: int = 1) -> Answer:
    endpoint.script = list(script)
    return client.submit(probe_request(FIELDS, seed), "jitter", keep).result(250)


@pytest.mark.parametrize(
    "way",
    ["busy", "broken", "cut", "gone", "wrong_json", "other_json", "deep_json", "html"],
)
def test_what_may_pass_is_tried_again(endpoint: EndpointServer, make: Any, way: str) -> None:
    client = make(endpoint)
    answer = ask(client, way, endpoint=endpoint)
    assert answer == ask(client, endpoint=endpoint)
    assert (answer.failure, answer.fingerprint) == ("", "fp_1")
    assert endpoint.asked.total() == 3


@pytest.mark.parametrize(
    ("way", "failure"),
    [
        ("refusal", "refused"), ("filtered", "refused"), ("no_choices", "empty"), ("silent", "empty"),
        ("bad_request", "http 4xx"), ("elsewhere", "http 3xx"), ("endless", "too long"), ("endless_error", "too long"),
        ("bomb", "bad answer"),
    ],
)  # fmt: skip
def test_what_will_not_pass_is_a_failure_of_the_one_image(
    endpoint: EndpointServer, make: Any, way: str, failure: str
) -> None:
    client = make(endpoint)
    ask(client, endpoint=endpoint)
    answer = ask(client, way, endpoint=endpoint, seed=7)
    assert (answer.text, answer.failure) == ("", failure)
    assert endpoint.asked.most_common()[-1][1] == 1, "asked once, the test picture apart"
    assert ask(client, endpoint=endpoint).text, "and others go on"


def test_the_content_type_does_not_matter(endpoint: EndpointServer, make: Any) -> None:
    assert ask(make(endpoint), "plain", endpoint=endpoint).text


@pytest.mark.parametrize("way", ["hang", "drip"])
def test_a_try_ends_at_its_deadline_whatever_drips_in(endpoint: EndpointServer, make: Any, way: str) -> None:
    client = make(endpoint, deadline=0.3)
    begun = time.monotonic()
    assert ask(client, way, way, way, endpoint=endpoint).failure == "timed out"
    assert 0.9 <= time.monotonic() - begun < 60


def test_a_request_that_fails_while_others_are_answered_is_one_failure(endpoint: EndpointServer, make: Any) -> None:
    """Its own picture makes the server fail: it answers the test picture."""
    assert ask(make(endpoint), *["broken"] * 3, endpoint=endpoint).failure == "http 5xx"


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("broken", "http 500"), ("gone", "cut off"), ("html", "bad answer, no chat completion, '<!DOCTYPE html>"),
        ("no_entry", "http 401, Error code: 401 - Incorrect API key provided: Bearer ***."), ("elsewhere", "http 307"),
    ],
)  # fmt: skip
def test_a_server_that_answers_nothing_ends_the_work(endpoint: EndpointServer, make: Any, way: str, said: str) -> None:
    endpoint.always = way
    client = make(endpoint)
    with pytest.raises(RunError, match="answers nothing, neither a request in 3 tries nor a test picture") as caught:
        ask(client, endpoint=endpoint)
    assert said in str(caught.value)
    assert KEY not in str(caught.value)
    before = endpoint.asked.total()
    with pytest.raises(RunError, match="answers nothing"):
        ask(client, endpoint=endpoint)
    assert endpoint.asked.total() - before == 2, "the next one is tried once"
    endpoint.always = "ok"
    assert ask(client, endpoint=endpoint).text
    assert ask(client, "broken", "broken", endpoint=endpoint).text, "and from then on as often as before"


def test_a_server_that_is_not_there(endpoint: EndpointServer, make: Any) -> None:
    client = make(endpoint, tries=1)
    endpoint.close()
    with pytest.raises(RunError, match="unreachable"):
        ask(client, endpoint=endpoint)


def test_no_more_are_under_way_than_allowed(endpoint: EndpointServer, make: Any) -> None:
    endpoint.delay = (0.01, 0.03)
    client = make(endpoint, in_flight=5)
    futures = [client.submit(probe_request(FIELDS, seed), "", keep) for seed in range(40)]
    assert {future.result(30).failure for future in futures} == {""}
    assert endpoint.most_busy == 5


def test_all_wait_as_long_as_the_server_asks(endpoint: EndpointServer, make: Any) -> None:
    """One is put off for a second: none of the others is sent in it."""
    client = make(endpoint, in_flight=1)
    endpoint.script = ["busy"]
    begun = time.monotonic()
    futures = [client.submit(probe_request(FIELDS, seed), "", keep) for seed in range(3)]
    assert all(future.result(30).text for future in futures)
    assert 1 <= time.monotonic() - begun < 60
    assert module._retry_after({"retry-after": "86400"}) == MAX_WAIT
    assert module._retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert [module._retry_after({"retry-after": odd}) for odd in ("nan", "-5", "soon", "")] == [0] * 4


def test_the_key_comes_from_the_environment_and_is_in_no_text(
    endpoint: EndpointServer, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(endpoint)
    assert ask(client, "key_back", endpoint=endpoint).text == "a sign that says Bearer ***"
    assert set(endpoint.key_seen) == {f"Bearer {KEY}"}
    monkeypatch.setenv("MINE", "other-key")
    ask(make(endpoint, key_variable="MINE"), endpoint=endpoint)
    assert endpoint.key_seen[-1] == "Bearer other-key"
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(make(endpoint), endpoint=endpoint)
    assert endpoint.key_seen[-1] == "Bearer none"
    with pytest.raises(RecipeError, match="key_variable names YOURS, which is not set"):
        make(endpoint, key_variable="YOURS")


def test_a_redirect_does_not_take_the_key_along(endpoint: EndpointServer, make: Any) -> None:
    client = make(endpoint)
    assert ask(client, "elsewhere", endpoint=endpoint).failure == "http 3xx"
    assert len(endpoint.key_seen) == 2, "the request and the test picture, and nothing at the other place"


def test_what_a_server_says_of_itself(endpoint: EndpointServer, make: Any) -> None:
    client = make(endpoint)
    assert client.get("/models")["data"][0]["id"] == "tiny"
    assert client.get("/nothing") is None
    endpoint.close()
    with pytest.raises(RunError, match="cannot be reached"):
        client.get("/models")


def test_the_library_may_be_missing(endpoint: EndpointServer, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(RecipeError, match=r"needs the package openai .* pip install 'capfilt\[endpoint\]'"):
        make(endpoint)
