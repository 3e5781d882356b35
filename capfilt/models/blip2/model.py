"""BLIP-2: a Q-Former between a frozen vision transformer and, in its second stage, a frozen language model.

After stage 1 (section 3.2) it compares, matches and writes by itself and has the methods of BLIP, with one difference:
an image is as many vectors as there are queries, and `similarity` takes the one nearest to the text. In stage 2
(section 3.3) the Q-Former has no part for texts any more: its queries pass through one linear layer into the language
model, which writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.models.blip.model import replace_first
from capfilt.models.blip2.config import Blip2Config
from capfilt.models.blip2.language_model import FORMATS, LanguageCache, LanguageModel
from capfilt.models.blip2.qformer import QFormer
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.interface import FrozenTower, Model
from capfilt.models.layers.bert import Cache, Head
from capfilt.models.layers.config import Role
from capfilt.models.layers.image_context import DecoderCache, ImageContext
from capfilt.models.layers.precision import unit
from capfilt.models.layers.transfer import mask_of, to_device
from capfilt.models.layers.vit import VisionTransformer


class Blip2(Model):
    """Stage 1 with both roles, a filter with the encoder's, a captioner with the decoder's or a language model."""

    config: Blip2Config
    entry_points = (*Model.entry_points, "project_queries", "predict")

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        eps = config.vision_norm_eps
        self.vision_norm = nn.LayerNorm(config.vision.width, eps=config.vision.layer_norm_eps if eps is None else eps)
        self.text = QFormer(config.text, config.vision.width)
        if config.compares:
            self.image_projection = nn.Linear(config.text.width, config.projection)
            self.text_projection = nn.Linear(config.text.width, config.projection)
            self.match_head = nn.Linear(config.text.width, 2)
            self.temperature = nn.Parameter(torch.tensor(config.temperature))
        if config.language is not None:
            self.language = LanguageModel(config.language, config.frozen)
            self.language_projection = nn.Linear(config.text.width, config.language.width)
        self.freeze()

    def freeze(self) -> None:
        """Take the vision tower out of training, and hold its matrices in the format of frozen towers."""
        self.vision.requires_grad_(False)
        self.vision.train(False)
        for module in self.vision.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(FORMATS[self.config.frozen])

    def train(self, mode: bool = True) -> Blip2:
        """Train all but the frozen towers."""
        super().train(mode)
        self.vision.train(False)
        return self

    def to_empty(self, *, device: Any, recurse: bool = True) -> Blip2:
        """As torch's, and what the language model ties stays tied."""
        super().to_empty(device=device, recurse=recurse)
        if self.config.language is not None:
            self.language.tie()
        return self

    def tied(self) -> dict[str, str]:
        if self.config.language is None:
            return {}
        return {f"language.{name}": f"language.{first}" for name, first in self.language.tied().items()}

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.vision, self.vision_norm]

    @property
    def frozen_tower(self) -> FrozenTower:
        described = (self.config.vision.model_dump(mode="json"), self.config.frozen)
        return FrozenTower(self.vision, self.encode_frozen, FORMATS[self.config.frozen], described)

    def recompute_vision(self, blocks: int) -> None:
        self.vision.recompute = blocks

    def adapt(self, tensors: Tensors) -> None:
        self.config.resize_positions(tensors)

    # ---- the methods of every model ----

    def encode_frozen(self, images_B3SS: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] -> what the frozen tower makes of them [B, N, vision width]; no gradients."""
        kind, dtype = images_B3SS.device.type, FORMATS[self.config.frozen]
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            seen: Tensor = self.vision(images_B3SS)
        return seen

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, S, S], or what `encode_frozen` made of them [B, N, D] -> tokens [B, N, D = vision width].

        The norm behind the tower alone takes gradients.
        """
        seen = images if images.ndim == 3 else self.encode_frozen(images)
        return self.vision_norm(seen.to(self.vision_norm.weight.dtype))

    def image_context(self, tokens_BND: Tensor, role: Role, prompt: Sequence[int] = ()) -> ImageContext:
        """Image tokens -> what `fuse` (role "encoder") or `decode` and `decode_step` (role "decoder") go on from.

        `prompt` are tokens that a T5 reads beside the image, before it writes.
        """
        keys = self.text.image_context(tokens_BND)
        if role == "encoder":
            return keys
        states, seen = self.text.run_queries(keys)
        return seen if self.config.language is None else self.language.read(self.language_projection(states), prompt)

    def image_context_modules(self, role: Role) -> list[nn.Module] | None:
        """None: what is attended to has passed through the whole Q-Former, which is compared with no other model's."""
        return None

    @property
    def output_layer(self) -> None:
        """None: `decode_step` takes no other head than the model's own."""
        return None

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts -> states [B, T, D], without looking at any image."""
        return self.text.read(ids_BT, mask_BT)

    def encode_cls(self, ids_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.encode_text(ids_BT, mask_of(lengths, ids_BT))[:, :1]

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        """Image tokens -> unit vectors [B, Q, projection], one for each query, fp32 under autocast too."""
        return self.project_queries(self.text.run_queries(self.text.image_context(tokens_BND))[0])

    def project_queries(self, states_BQD: Tensor) -> Tensor:
        """States of the queries -> unit vectors [B, Q, projection]."""
        return unit(self.image_projection(states_BQD))

    def project_text(self, states_BTD: Tensor) -> Tensor:
        """Text states -> unit vectors [B, projection], fp32 under autocast too."""
        return unit(self.text_projection(states_BTD[:, 0]))

    def similarity(self, image_IQP: Tensor, text_TP: Tensor) -> Tensor:
        """Vectors of images and of texts -> cosines [I, T]: of an image's queries the one nearest to the text."""
        return (image_IQP @ text_TP.T).amax(dim=1)

    def fuse(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """Texts read beside images -> the queries' states [B, Q, D]; rows that share an image are adjacent."""
        return self.text.encode_multimodal(ids_BT, mask_BT, image)

    def fuse_cls(self, ids_BT: Tensor, lengths: Sequence[int], image: ImageContext, counts: Sequence[int]) -> Tensor:
        if len(set(counts)) > 1:  # as many rows as texts: nothing to share
            rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            image = image.select(to_device(rows, ids_BT.device))
        return self.fuse(ids_BT, mask_of(lengths, ids_BT), image)

    def match(self, states_BQD: Tensor) -> Tensor:
        """Fused states -> ITM logits [B, 2], the mean over queries; column 1 is "matches"."""
        return self.match_head(states_BQD).mean(dim=1)

    def decode(self, ids_BT: Tensor, mask_BT: Tensor | None, image: ImageContext) -> Tensor:
        ids_BT = replace_first(ids_BT, self.config.text.dec)
        return self.text.logits(self.text.write(ids_BT, mask_BT, image))

    def cache(self, rows: int, length: int, image: ImageContext) -> Cache | LanguageCache:
        if self.config.language is not None:
            return LanguageCache()
        return Cache(self.config.text, rows, length, image.tensors[0])

    def decode_step(self, ids_BT: Tensor, image: ImageContext, cache: DecoderCache, head: Head | None = None) -> Tensor:
        assert head is None, "a head of another family"
        if isinstance(cache, LanguageCache):
            return self.language.step(ids_BT, image, cache)
        assert isinstance(cache, Cache), "the cache of another model"
        return self.text.logits(self.text.write(ids_BT, None, image, cache)[:, -1:])[:, 0]

    # ---- stage 2 ----

    def predict(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """Image tokens and texts of the language model -> its logits [B, T, V] and what they should tell [B, T]."""
        states, _ = self.text.run_queries(self.text.image_context(tokens_BND))
        return self.language.predict(self.language_projection(states), ids_BT, mask_BT, prompt)
