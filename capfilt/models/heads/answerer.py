"""Answers to questions about pictures: a decoder beside what a base fuses (ALBEF section 5, VQA; X-VLM)."""

from __future__ import annotations

from torch import Tensor

from capfilt.models.checkpoints.files import Tensors
from capfilt.models.heads.base import HeadModel
from capfilt.models.heads.config import AnswererConfig
from capfilt.models.layers.bert import Cache, Head, OutputLayer, TextTransformer
from capfilt.models.layers.image_context import DecoderCache, ImageContext


class Answerer(HeadModel):
    """A base and a decoder of answers, with weights of its own that begin as the base's last layers and its head."""

    config: AnswererConfig

    def __init__(self, config: AnswererConfig):
        super().__init__(config)
        self.decoder = TextTransformer(config.decoder, config.base.fused_width)

    def begin_head(self, tensors: Tensors) -> frozenset[str]:
        """The decoder's layers from the last ones of a saved base, its embeddings and its head from the base's; what is
        of another shape, or not there, stays fresh: keys and values of states of another width, biases included
        (X-VLM)."""
        own = self.decoder.state_dict()
        below = self.config.base.text.depth - self.config.decoder.depth  # type: ignore[attr-defined]

        def saved(name: str) -> Tensor | None:
            part, _, rest = name.removeprefix("layers.").partition(".")
            tensor = tensors.get(
                f"text.layers.{int(part) + below}.{rest}" if name.startswith("layers.") else f"text.{name}"
            )
            return tensor if tensor is not None and tensor.shape == own[name].shape else None

        def whole(name: str) -> bool:
            weight = f"{name.removesuffix('bias')}weight"
            return not name.endswith("bias") or weight not in own or saved(weight) is not None

        begun = {name: tensor for name in own if (tensor := saved(name)) is not None and whole(name)}
        self.decoder.load_state_dict(own | begun)
        return frozenset(f"decoder.{name}" for name in begun)

    @property
    def output_layer(self) -> OutputLayer:
        return self.decoder.output_layer()

    @property
    def decoder_stack(self) -> TextTransformer:
        return self.decoder

    def question_context(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> ImageContext:
        states = self.base.fuse(ids_BT, mask_BT, self.base.image_context(tokens_BND, "encoder"))
        return self.decoder.image_context(states, "decoder")._replace(mask=mask_BT.bool()[:, None, None])

    def decode(self, ids_BT: Tensor, mask_BT: Tensor | None, image: ImageContext) -> Tensor:
        return self.decoder.logits(self.decoder(ids_BT, "decoder", mask_BT, image))

    def cache(self, rows: int, length: int, image: ImageContext) -> Cache:
        return Cache(self.config.decoder, rows, length, image.tensors[0])

    def decode_step(self, ids_BT: Tensor, image: ImageContext, cache: DecoderCache, head: Head | None = None) -> Tensor:
        assert isinstance(cache, Cache), "the cache of another model"
        states = self.decoder(ids_BT, "decoder", None, image, cache)
        return self.decoder.logits(states[:, -1:])[:, 0] if head is None else head(states[:, -1])
