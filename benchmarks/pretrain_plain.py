"""BLIP's pretraining step as one would write it with transformers' modules: what `pretrain.py gpu` compares with.

The same losses on the same tensors (ITC with a momentum copy and queues, ITM with hard negatives, LM), one forward of
the vision tower, and three text models as transformers has them: a text encoder, its momentum copy, a decoder whose
embeddings, cross-attention and feed-forward are the encoder's. Nothing is distributed and nothing is logged.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from capfilt.models import BlipConfig
from capfilt.objectives.config import ObjectivesConfig

MOMENTUM, ALPHA = 0.995, 0.4


class Towers(nn.Module):
    """What has a momentum copy."""

    def __init__(self, config: BlipConfig):
        super().__init__()
        v, t = config.vision, config.text
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=v.width, intermediate_size=v.hidden, num_hidden_layers=v.depth,
                num_attention_heads=v.heads, image_size=v.image_size, patch_size=v.patch_size, initializer_range=0.02,
            )
        )  # fmt: skip
        self.text_config = BlipTextConfig(
            vocab_size=t.vocab_size, hidden_size=t.width, encoder_hidden_size=v.width, intermediate_size=t.hidden,
            num_hidden_layers=t.depth, num_attention_heads=t.heads, max_position_embeddings=t.max_positions,
            hidden_dropout_prob=t.dropout, attention_probs_dropout_prob=t.dropout, is_decoder=True,
        )  # fmt: skip
        self.text = BlipTextModel(self.text_config, add_pooling_layer=False)
        self.image_projection = nn.Linear(v.width, config.projection)
        self.text_projection = nn.Linear(t.width, config.projection)

    def features(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens, unit features of images and of texts."""
        tokens = self.vision(images).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, is_decoder=False).last_hidden_state
        image, text = self.image_projection(tokens[:, 0]), self.text_projection(states[:, 0])
        return tokens, F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


class PlainStep:
    """Model, momentum copy, queues and optimizer."""

    def __init__(self, config: BlipConfig, objectives: ObjectivesConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.online = Towers(config).to(device)
        self.decoder = BlipTextLMHeadModel(self.online.text_config).to(device)
        self.match = nn.Linear(config.text.width, 2).to(device)
        self.temperature = nn.Parameter(torch.tensor(0.07, device=device))
        self._tie()
        self.slow = copy.deepcopy(self.online).requires_grad_(False)
        self.queues = [
            F.normalize(torch.randn(objectives.queue, config.projection, device=device), dim=-1) for _ in range(2)
        ]
        self.pointer = 0
        self.weights = list(
            {p for part in (self.online, self.decoder, self.match) for p in part.parameters()} | {self.temperature}
        )
        fused = {"fused": True} if device.type == "cuda" else {"foreach": True}
        self.optimizer = torch.optim.AdamW(self.weights, lr=3e-4, weight_decay=0.05, **fused)

    def _tie(self) -> None:
        """All but self-attention is the encoder's."""
        ours, theirs = self.online.text, self.decoder.bert
        theirs.embeddings = ours.embeddings
        self.decoder.cls.predictions.decoder.weight = ours.embeddings.word_embeddings.weight
        for one, other in zip(theirs.encoder.layer, ours.encoder.layer, strict=True):
            one.crossattention, one.intermediate, one.output = other.crossattention, other.intermediate, other.output

    def take(self, images: Tensor, ids: Tensor, mask: Tensor) -> None:
        """One step."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                self.temperature.clamp_(0.001, 0.5)
                for p, q in zip(self.slow.parameters(), self.online.parameters(), strict=True):
                    p.lerp_(q, 1 - MOMENTUM)
                _, slow_image, slow_text = self.slow.features(images, ids, mask)
            tokens, image, text = self.online.features(images, ids, mask)
            loss, to_text, to_image = self._itc(image, text, slow_image, slow_text)
            loss = loss + self._itm(tokens, ids, mask, to_text, to_image) + self._lm(tokens, ids, mask)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        rows = slice(self.pointer, self.pointer + ids.shape[0])
        self.queues[0][rows], self.queues[1][rows] = slow_image, slow_text
        self.pointer = rows.stop % len(self.queues[0])

    def _itc(self, image: Tensor, text: Tensor, slow_image: Tensor, slow_text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys_image, keys_text = torch.cat([slow_image, self.queues[0]]), torch.cat([slow_text, self.queues[1]])
        B = image.shape[0]
        with torch.autocast(self.device.type, enabled=False):
            onehot = torch.eye(B, keys_text.shape[0], device=self.device)
            logits = image @ keys_text.T / self.temperature, text @ keys_image.T / self.temperature
            with torch.no_grad():
                soft = slow_image @ keys_text.T / self.temperature, slow_text @ keys_image.T / self.temperature
                targets = [ALPHA * s.softmax(dim=1) + (1 - ALPHA) * onehot for s in soft]
            losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets, strict=True)]
        return (losses[0] + losses[1]) / 2, logits[0][:, :B].detach(), logits[1][:, :B].detach()

    def _itm(self, tokens: Tensor, ids: Tensor, mask: Tensor, to_text: Tensor, to_image: Tensor) -> Tensor:
        B = ids.shape[0]
        ids = torch.cat([torch.full_like(ids[:, :1], self.config.text.enc), ids[:, 1:]], dim=1)
        wrong_image, wrong_text = (
            torch.multinomial((x.softmax(dim=1) + 1e-4).fill_diagonal_(0), 1).squeeze(1) for x in (to_image, to_text)
        )
        states = self.online.text(
            input_ids=torch.cat([ids, ids, ids[wrong_text]]),
            attention_mask=torch.cat([mask, mask, mask[wrong_text]]),
            encoder_hidden_states=torch.cat([tokens, tokens[wrong_image], tokens]),
            is_decoder=False,
        ).last_hidden_state
        labels = torch.zeros(3 * B, dtype=torch.long, device=self.device)
        labels[:B] = 1
        return F.cross_entropy(self.match(states[:, 0]).float(), labels)

    def _lm(self, tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        ids = torch.cat([torch.full_like(ids[:, :1], self.config.text.dec), ids[:, 1:]], dim=1)
        logits = self.decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens).logits
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), label_smoothing=0.1)
