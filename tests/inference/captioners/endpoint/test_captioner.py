from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_server import EndpointServer, caption

from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import RunError, TimeLimitError
from capfilt.inference.batches import pictures
from capfilt.inference.captioners.endpoint import client as client_module
from capfilt.inference.captioners.endpoint.captioner import EndpointCaptioner
from capfilt.inference.captioners.endpoint.requests import seed_of
from capfilt.inference.config import AnnotateConfig
from capfilt.inference.interface import AsksAhead
from capfilt.runs import deadline


@pytest.fixture
def samples(picture: Any) -> list[Sample]:
    return [Sample(f"{i:03d}", picture("PNG", seed=i), "png", "a dog", {}) for i in range(30)]


@pytest.fixture
def captioner(endpoint: EndpointServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EndpointCaptioner]:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.02)
    config = AnnotateConfig.model_validate({"requests": {"in_flight": 4, "tries": 2, "deadline": 5}, "captions": 2})
    made = EndpointCaptioner((endpoint.url, "tiny"), config, 3, 1, tmp_path / "cache")
    yield made
    made._client.close()


def written(captioner: EndpointCaptioner, samples: list[Any], batch_size: int = 8) -> list[list[str]]:
    """The texts of samples as a stage has them written."""
    texts: list[list[str]] = []
    with captioner.shard("00000"):
        for batch in pictures(samples, batch_size, (), asker=captioner):
            images = batch.on(torch.device("cpu"), ())
            texts += [[text.text for text in of_image] for of_image in captioner.caption(images, batch.samples)]
    return texts


def test_each_text_is_that_of_its_image_and_its_seed(
    captioner: EndpointCaptioner, endpoint: EndpointServer, samples: list[Sample]
) -> None:
    assert isinstance(captioner, AsksAhead)
    endpoint.delay = (0.0, 0.01)
    told = [[caption(s.image, seed_of(3, 1, s.uid, c)) for c in range(2)] for s in samples]
    assert [[text.lower() for text in of_image] for of_image in written(captioner, samples)] == told
    assert set(endpoint.asked.values()) == {1}
    assert endpoint.most_busy == 4
    assert captioner._asked == {}


def test_the_next_batches_are_asked_for_while_one_is_waited_for(
    captioner: EndpointCaptioner, endpoint: EndpointServer, picture: Any
) -> None:
    samples = [Sample(f"{i:03d}", picture("PNG", seed=i), "png", "a dog", {}) for i in range(60)]
    with captioner.shard("00000"):
        batches = pictures(samples, 8, (), asker=captioner)
        first = next(batches)
        captioner.caption(first.on(torch.device("cpu"), ()), first.samples)
        while endpoint.answered.total() < 2 * (8 + captioner.ahead):  # nobody waits for the later ones
            threading.Event().wait(0.01)
        asked = endpoint.asked.total()
        second = next(batches)
        captioner.caption(second.on(torch.device("cpu"), ()), second.samples)
    assert asked <= 2 * (8 + 3 * 8 + 1), "as far ahead as pictures are decoded, and no further"


def test_asked_again_after_an_out_of_memory_and_for_twins_it_pays_once(
    captioner: EndpointCaptioner, endpoint: EndpointServer, samples: list[Sample]
) -> None:
    twins = [samples[0], Sample("twin", samples[0].image, "png", "another text", {}), *samples[1:3]]
    with captioner.shard("00000"):
        (batch,) = pictures(twins, 8, (), asker=captioner)
        images = batch.on(torch.device("cpu"), ())
        once, again = captioner.caption(images, batch.samples), captioner.caption(images, batch.samples)
    assert once == again
    assert once[0] == once[1]
    assert endpoint.asked.total() == 2 * 3


def test_what_cannot_be_decoded_is_not_sent(
    captioner: EndpointCaptioner, endpoint: EndpointServer, samples: list[Sample]
) -> None:
    broken = Sample("x", samples[0].image[:50], "png", "", {})
    assert len(written(captioner, [broken, FailedSample("y", "text is not UTF-8"), samples[0]])) == 1
    assert endpoint.asked.total() == 2


def test_prompts_and_guard_rails_hold_for_its_answers(endpoint: EndpointServer, samples: list[Sample]) -> None:
    config = AnnotateConfig.model_validate(
        {"captions": 2, "vlm": {"prompts": ["fuse", "ignore"], "stop": [" and "], "max_new_tokens": 7}}
    )
    made = EndpointCaptioner((endpoint.url, "tiny"), config, 0, 0, None)
    ((fused, ignored),) = made.caption(None, samples[:1])  # type: ignore[arg-type]
    made._client.close()
    assert (fused.prompt, ignored.prompt) == ("fuse", "ignore")
    assert all(" and " not in text and text for text in (fused.text, ignored.text))
    asked = {body["messages"][0]["content"][1]["text"]: body for body in endpoint.bodies}
    assert sum("a dog" in text for text in asked) == 1
    assert {body["max_tokens"] for body in asked.values()} == {7}


def test_what_is_waited_for_ends_with_the_time_of_the_shard_or_with_the_server(
    captioner: EndpointCaptioner, endpoint: EndpointServer, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capfilt.inference.captioners.endpoint.captioner.POLL_SECONDS", 0.05)
    endpoint.always = "hang"
    with deadline.time_limit(0.2), pytest.raises(TimeLimitError):
        written(captioner, samples)
    endpoint.always = "dead"
    with pytest.raises(RunError, match="answers nothing"):
        written(captioner, samples)
    endpoint.always = "ok"
    assert len(written(captioner, samples)) == 30, "and another shard goes on"
