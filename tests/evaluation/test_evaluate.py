from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.synthetic.world import WorldConfig, write
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError
from capfilt.evaluation import evaluate, known_truth
from capfilt.evaluation.config import EvaluateConfig
from capfilt.evaluation.eval_set import EvalSet, encode_batches, encode_pairs
from capfilt.evaluation.known_truth import ScoredTexts
from capfilt.evaluation.metrics import matching, retrieval
from capfilt.inference.device import autocast
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.load("world")
WORLD = WorldConfig(web=40, test=9, captions=2, shard_size=20)


@pytest.fixture(scope="module")
def model(small_blip: Callable[..., Blip]) -> Blip:
    return small_blip()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for split in ("web", "test"):
        write(WORLD, 0, folder, split)
    return folder


def read(folder: Path) -> Iterator[Sample]:
    for url in shards.expand(str(folder)):
        for item in shards.read(url):
            assert isinstance(item, Sample)
            yield item


def local(model: Blip) -> LocalModel:
    return LocalModel(model, TOKENIZER)


def fusion(model: Blip) -> FusionFilter:
    return FusionFilter(local(model))


def held_out(model: Blip, data: Path, batch_size: int = 4) -> EvalSet:
    return encode_pairs(local(model), shards.expand(str(data / "test")), batch_size, CPU)


def same(result: dict[str, Any], wanted: Any) -> None:
    """Equal figures, the table by kind included."""
    flat = [{**figures, **figures["auc_by_kind"]} for figures in (result, wanted)]
    for figures in flat:
        del figures["auc_by_kind"]
    assert flat[0] == pytest.approx(flat[1], abs=1e-6)


def naive_scores(model: Blip, held: EvalSet) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and P(match) of every image with every text, one pair at a time."""
    filter_ = fusion(model)
    pairs = [[filter_.score_tokens(image[None], [[text]]) for text in held.flat_texts] for image in held.tokens]
    itc, itm = (np.array([[scores[name][0][0] for scores in row] for row in pairs]) for name in ("itc", "itm"))  # type: ignore[index]
    return itc, itm


def test_a_held_out_set_is_seen_in_its_order_whatever_the_batch(model: Blip, data: Path) -> None:
    held = held_out(model, data)
    came = list(read(data / "test"))
    assert held.uids == [sample.uid for sample in came]
    assert held.texts == [[caption["text"] for caption in sample.captions] for sample in came]
    assert held.image_of_text.tolist() == [i // 2 for i in range(18)]
    torch.testing.assert_close(held.tokens, held_out(model, data, batch_size=100).tokens)


def test_retrieval_is_that_of_every_pair(model: Blip, data: Path) -> None:
    held = held_out(model, data)
    cosines, _ = naive_scores(model, held)
    actual = evaluate.retrieve(fusion(model), held, EvaluateConfig(batch_size=4))
    assert actual == pytest.approx(retrieval.recalls(cosines, held.image_of_text))


def test_in_bf16_cosines_are_taken_in_fp32_and_figures_are_near(model: Blip, data: Path) -> None:
    """On a CPU too, where autocast would multiply unit vectors in bf16, which numpy does not know."""
    one, other = (np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32) for seed in (0, 1))
    urls, config = shards.expand(str(data / "test")), EvaluateConfig(batch_size=4)
    wanted = evaluate.examine(local(model), urls, config, CPU)
    with autocast(CPU, torch.bfloat16):
        np.testing.assert_allclose(fusion(model).similarities(one, other), one @ other.T, rtol=1e-5)
        found = evaluate.examine(local(model), urls, config, CPU)
    assert found["retrieval"] == pytest.approx(wanted["retrieval"], abs=15)
    assert found.keys() == wanted.keys()


def test_reranking_all_candidates_is_logit_plus_cosine_of_every_pair(model: Blip, data: Path) -> None:
    held = held_out(model, data)
    cosines, matches = naive_scores(model, held)
    filter_ = fusion(model)
    logits = np.array([filter_.match_logits(image.expand(18, -1, -1), held.flat_texts) for image in held.tokens])
    # The two-way softmax says the same as the difference of its logits; BLIP adds the positive one alone.
    assert np.corrcoef(logits.ravel(), np.log(matches / (1 - matches)).ravel())[0, 1] > 0.5
    actual = evaluate.retrieve(filter_, held, EvaluateConfig(batch_size=4, rerank=18))
    assert actual == pytest.approx(retrieval.recalls(logits + cosines, held.image_of_text))


@pytest.mark.parametrize("score", ["itm", "itc"])
def test_calibration_sets_own_texts_against_another_image_s(
    model: Blip, data: Path, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = held_out(model, data)
    cosines, matches = naive_scores(model, held)
    table = {"itm": matches, "itc": cosines}[score]
    own = np.array([table[i // 2, i] for i in range(18)])

    calls: dict[str, np.ndarray] = {}

    def spy(positives: Any, negatives: Any, recall: float) -> str:
        calls.update(right=np.array(positives), wrong=np.array(negatives), recall=np.array(recall))
        return "calibrated"

    monkeypatch.setattr(matching, "calibrate", spy)
    assert evaluate.calibrate(fusion(model), held, score, 0.8, 4) == "calibrated"  # type: ignore[comparison-overlap]
    assert calls["recall"] == 0.8
    assert np.allclose(calls["right"], own, atol=1e-5)
    # Each image is given the two texts of one other image, and every image's texts are given once.
    strangers = calls["wrong"].reshape(9, 2)
    givers = [
        [j for j in range(9) if np.allclose(table[i, 2 * j : 2 * j + 2], strangers[i], atol=1e-5)] for i in range(9)
    ]
    assert all(i not in actual and actual for i, actual in enumerate(givers))
    assert {j for actual in givers for j in actual} == set(range(9))


def test_everything_is_measured_where_it_can_be(model: Blip, data: Path, small_blip: Callable[..., Blip]) -> None:
    config = EvaluateConfig(batch_size=7)
    both = [*shards.expand(str(data / "web")), *shards.expand(str(data / "test"))]
    result = evaluate.examine(local(model), both, config, CPU)
    assert result.keys() == {"retrieval", "captioning", "filter"}
    assert result["captioning"]["tokenisation"] == "words"
    alone = evaluate.examine(local(model), shards.expand(str(data / "test")), config, CPU)
    assert alone.keys() == {"retrieval", "captioning"}
    assert result["retrieval"] == pytest.approx(alone["retrieval"])
    web = shards.expand(str(data / "web"))
    scored_texts = evaluate.examine(local(model), web, config, CPU)
    assert scored_texts.keys() == {"filter"}
    same(scored_texts["filter"], result["filter"])
    captioner_model = small_blip(roles=("decoder",))
    assert evaluate.examine(local(captioner_model), both, config, CPU).keys() == {"captioning"}
    with pytest.raises(DataError, match="nothing can be measured"):
        evaluate.examine(local(captioner_model), web, config, CPU)


def test_the_filter_s_figures_are_those_of_its_scores(model: Blip, data: Path) -> None:
    filter_, scores, matches, kinds = fusion(model), [], [], []
    urls = shards.expand(str(data / "web"))
    for batch in encode_batches(local(model), urls, 5, CPU):
        for image, sample in zip(batch.tokens, batch.samples, strict=True):
            scores.append(filter_.score_tokens(image[None], [[sample.text]])["itc"][0][0])  # type: ignore[index]
            matches.append(sample.meta["truth"]["matches"])
            kinds.append(sample.meta["truth"]["kind"])
    config = EvaluateConfig(batch_size=7, score="itc", threshold=float(np.median(scores)) - 1e-4)
    result = evaluate.examine(local(model), urls, config, CPU)["filter"]
    wanted = matching.report(np.array(scores), np.array(matches), kinds, config.threshold)
    same(result, wanted)


def test_a_dropped_web_text_is_not_scored_in_a_cleaned_shard(model: Blip, data: Path, tmp_path: Path) -> None:
    """There the first text may be the captioner's, of which the truth says nothing."""
    cleaned = []
    for i, sample in enumerate(read(data / "web")):
        captions = [{"text": "a red circle", "source": "synthetic"}]
        captions += [{"text": sample.text, "source": "web"}] if i % 4 else []
        meta = {**sample.meta, "captions": captions}
        cleaned.append(Sample(sample.key, sample.image, sample.extension, "a red circle", meta))
    shards.write(tmp_path / "0.tar", cleaned)
    scored_texts = ScoredTexts()
    for batch in encode_batches(local(model), [str(tmp_path / "0.tar")], 16, CPU):
        evaluate.score_known(fusion(model), "itm", batch, scored_texts)
    assert len(scored_texts.scores) == 30
    truths = [sample.meta["truth"] for i, sample in enumerate(cleaned) if i % 4]
    assert scored_texts.kinds == [truth["kind"] for truth in truths]
    assert scored_texts.matches == [truth["matches"] for truth in truths]


def test_pictures_that_cannot_be_read_are_counted_and_stop_nothing(model: Blip, data: Path, tmp_path: Path) -> None:
    whole = list(read(data / "test"))
    broken = Sample("broken", b"\xff\xd8\xffnothing", "jpg", "a cat", {})
    shards.write(tmp_path / "0.tar", [*whole[:4], broken, *whole[4:]])
    result = evaluate.examine(local(model), [str(tmp_path / "0.tar")], EvaluateConfig(batch_size=3), CPU)
    assert result.pop("unreadable") == 1
    assert result["retrieval"] == pytest.approx(
        evaluate.examine(local(model), shards.expand(str(data / "test")), EvaluateConfig(), CPU)["retrieval"]
    )
    shards.write(tmp_path / "1.tar", [broken])
    with pytest.raises(DataError, match=r"1 unreadable"):
        evaluate.examine(local(model), [str(tmp_path / "1.tar")], EvaluateConfig(), CPU)
    with pytest.raises(DataError, match="has no picture that can be read"):
        encode_pairs(local(model), [str(tmp_path / "1.tar")], 4, CPU)


def test_one_picture_under_many_keys_is_one_image_with_all_their_texts(model: Blip, data: Path, tmp_path: Path) -> None:
    """Equal by its uid or by its bytes, in another shard too, and through a third one."""
    a, b, c, *_ = read(data / "test")
    again = [
        Sample("a2", a.image, "png", "one", {}),  # the same bytes, without the uid
        Sample("a3", b.image, "png", "two", {"uid": a.uid}),  # the same uid, other bytes: those of b
        Sample("c2", c.image, "png", "", {"captions": ["three", "four"]}),
        Sample("c3", c.image, "png", "...", {}),
    ]
    shards.write(tmp_path / "0.tar", [a, c])
    shards.write(tmp_path / "1.tar", [b, *again])
    urls = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]
    texts = [[caption["text"] for caption in sample.captions] for sample in (a, b, c)]
    held = encode_pairs(local(model), urls, 2, CPU)
    assert held.uids == [a.uid, c.uid]
    assert held.texts[0][:2] == texts[0]
    assert sorted(held.texts[0]) == sorted([*texts[0], *texts[1], "one", "two"])
    assert held.texts[1] == [*texts[2], "three", "four"]
    assert held.without_text == 1
    whole = held_out(model, data)
    torch.testing.assert_close(held.tokens, whole.tokens[[0, 2]])
    actual = evaluate.examine(local(model), urls, EvaluateConfig(batch_size=3), CPU)
    assert actual["without_text"] == 1
    assert actual["retrieval"] == evaluate.retrieve(fusion(model), held, EvaluateConfig(batch_size=3))


def test_a_model_that_is_always_right_finds_a_picture_under_five_keys(
    model: Blip, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = list(read(data / "test"))[:4]
    made = [Sample(f"{i}-{n}", s.image, "png", f"{i} {n}", {}) for n in range(5) for i, s in enumerate(pictures)]
    shards.write(tmp_path / "0.tar", made)
    held = encode_pairs(local(model), [str(tmp_path / "0.tar")], 3, CPU)
    assert held.texts == [[f"{i} {n}" for n in range(5)] for i in range(4)]
    filter_ = fusion(model)
    right = np.eye(4)[held.image_of_text].T
    monkeypatch.setattr(filter_, "similarities", lambda image, text: right)
    assert set(evaluate.retrieve(filter_, held, EvaluateConfig()).values()) == {100.0}


def test_pictures_without_a_text_are_in_no_figure(model: Blip, data: Path, tmp_path: Path) -> None:
    whole = list(read(data / "test"))
    web = list(read(data / "web"))
    bare = [Sample("bare0", web[0].image, "png", "", {}), Sample("bare1", web[1].image, "png", "?!", {})]
    shards.write(tmp_path / "0.tar", [bare[0], *whole, bare[1]])
    result = evaluate.examine(local(model), [str(tmp_path / "0.tar")], EvaluateConfig(), CPU)
    assert result.pop("without_text") == 2
    alone = evaluate.examine(local(model), shards.expand(str(data / "test")), EvaluateConfig(), CPU)
    assert result == {kind: pytest.approx(figures, abs=1e-6) for kind, figures in alone.items()}
    shards.write(tmp_path / "1.tar", bare)
    with pytest.raises(DataError, match=r"0 unreadable, 2 without a text"):
        evaluate.examine(local(model), [str(tmp_path / "1.tar")], EvaluateConfig(), CPU)


def test_the_truth_of_a_shard_is_asked_once(data: Path, tmp_path: Path) -> None:
    web, test = (shards.expand(str(data / split))[0] for split in ("web", "test"))
    result = {sample.uid: sample.meta["truth"] for sample in list(read(data / "web"))[:20]}
    assert known_truth.truths(web) == {uid: (truth["matches"], truth["kind"]) for uid, truth in result.items()}
    assert known_truth.truths(test) == {}
    # After the first sample without one, nothing more is read: a crawl has millions.
    (tmp_path / "0.tar").write_bytes(Path(test).read_bytes()[:8192] + b"\0garbage" * 1000)
    assert any(isinstance(item, FailedSample) for item in shards.read(str(tmp_path / "0.tar")))
    assert known_truth.truths(str(tmp_path / "0.tar")) == {}


@pytest.mark.parametrize("result", [None, "yes", {"matches": True}, ["right"]])
def test_what_others_call_truth_is_not_ours(result: Any) -> None:
    assert known_truth.truth(Sample("k", b"", "jpg", "t", {"truth": result})) is None
