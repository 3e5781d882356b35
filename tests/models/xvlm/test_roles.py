"""X-VLM as a filter of both scores, and as a captioner with BERT's [CLS] and [SEP]."""

from __future__ import annotations

import pytest
import torch

from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.filters import FusionFilter, local_filter
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import scores_given
from capfilt.models import architecture_of, build
from capfilt.models.architecture import ModelRole


def local(role: ModelRole) -> LocalModel:
    torch.manual_seed(0)
    model = build(architecture_of("xvlm/tiny").for_role(role)).eval()
    return LocalModel(model, tokenizer_of("world", model.config.tokenizer_kind))


def test_a_filter_gives_both_scores() -> None:
    filter_ = local_filter(local("filter"), 20)
    assert isinstance(filter_, FusionFilter)
    assert scores_given(filter_.local.model.capabilities) == ("itm", "itc")
    model, tokenizer = filter_.local.model, filter_.local.tokenizer
    texts = [["a red circle", "a blue square on a gray background"], ["a ring"]]
    with torch.no_grad():
        tokens = model.encode_image(torch.randn(2, 3, 32, 32))
        scores = filter_.score_tokens(tokens, texts)
        for row, of_image in enumerate(texts):
            for text, itm, itc in zip(of_image, (scores["itm"] or [])[row], (scores["itc"] or [])[row], strict=True):
                ids, mask = (torch.from_numpy(x) for x in tokenizer.encode([text], 20))
                assert ids[0, -1] != tokenizer.sep
                image = tokens[row : row + 1]
                logits = model.match(model.fuse(ids, mask, model.image_context(image, "encoder")))
                assert itm == pytest.approx(logits.softmax(dim=1)[0, 1].item(), abs=1e-5)
                cosine = model.project_image(image) @ model.project_text(model.encode_text(ids, mask)).T
                assert itc == pytest.approx(cosine.item(), abs=1e-5)


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_a_captioner_writes_behind_its_prompt(method: str) -> None:
    config = DecodeConfig.model_validate(
        {"method": method, "prompt": "a picture of ", "min_length": 6, "max_length": 12}
    )
    captioner = LocalCaptioner(local("captioner"), config)
    names = captioner.tokenizer.vocab
    assert [names[index] for index in captioner.prompt] == ["[CLS]", "a", "picture", "of"]
    with torch.no_grad():
        texts = captioner.write(captioner.model.encode_image(torch.randn(2, 3, 32, 32)), ["a", "b"])
    assert len(texts) == 2
    assert all(isinstance(text, str) for of_image in texts for text in of_image)
