"""ViLT's trainings: pretraining (section 3.2), and fine-tuning for retrieval (section 4.3).

A step of pretraining is two passes over its pairs: one of texts with hidden words beside their images, for MLM; one of
whole texts, half of them beside another image of this process's pairs, for ITM and the alignment of words and patches
(WPA). One of fine-tuning for retrieval reads each image beside its text and 15 wrong ones.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models.layers.precision import at_least_fp32
from capfilt.models.vilt.model import Vilt
from capfilt.objectives.collectives import as_wide, gather
from capfilt.objectives.draws import one_of_each_row
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Precision, Task
from capfilt.objectives.kinds.vilt import ViltObjectives, ViltRetrievalObjectives
from capfilt.objectives.losses.itm import LEFT_OUT
from capfilt.objectives.losses.mlm import mlm, num_hidden
from capfilt.objectives.losses.wpa import transport_cost, wpa
from capfilt.objectives.masking import Masked, whole_words


class Drawn(NamedTuple):
    """What a step draws at random; None for what no loss of it needs."""

    masked: Masked | None
    matches_B: Tensor
    """True where the second pass reads a text beside its own image."""
    images: Tensor | None
    """The pictures of the second pass."""
    mlm_patches: Tensor | None
    itm_patches: Tensor | None
    """The patches that each pass reads, [B, K] numbers row by row of the grid; None: all."""
    hidden: Tensor
    """How many tokens of all the pairs are hidden."""

    def select(self, rows: slice) -> Drawn:
        masked = None if self.masked is None else Masked(*(part[rows] for part in self.masked))
        parts = (None if part is None else part[rows] for part in self[1:-1])
        return Drawn(masked, *parts, hidden=self.hidden)  # type: ignore[arg-type, misc]


class WrongTexts(NamedTuple):
    """K wrong texts for each of B pairs."""

    ids_BKT: Tensor
    mask_BKT: Tensor
    labels_B: Tensor
    """The place of the right text before them, 0; `LEFT_OUT` for a pair without another image to take texts from."""

    def select(self, rows: slice) -> WrongTexts:
        return WrongTexts(*(part[rows] for part in self))


class PairsApart(Task):
    """Trains a ViLT so that no pair's loss depends on another's, once all is drawn."""

    model: Vilt
    chunks_enter_model = True

    @abstractmethod
    def draw(self, batch: PairBatch) -> Drawn | WrongTexts:
        """What the losses of these pairs draw."""

    @abstractmethod
    def losses_of(self, batch: PairBatch, drawn: Any, rows: int) -> LossesAndMetrics:
        """The part that these pairs have in the losses over `rows` pairs."""

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        return self.losses_of(batch, self.draw(batch), batch.rows)

    def backward_in_chunks(
        self, batch: PairBatch, progress: float, chunks: int, precision: Precision
    ) -> LossesAndMetrics:
        """The gradients of the whole batch with the memory of a chunk."""
        self.before_step()
        drawn = self.draw(batch)
        sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for rows in batch.chunks(chunks):
            with precision():
                parts = self.losses_of(batch.select(rows), drawn.select(rows), batch.rows)
                total = self.total(parts[0])
            total.backward()
            for into, part in zip(sums, parts, strict=True):
                for name, value in part.items():
                    into[name] = into[name] + value.detach() if name in into else value.detach()
        return sums


class ViltPretraining(PairsApart):
    """A ViLT.

    Its draws are `masked`; `matches` [B] bool; `wrong_images`, rows of the batch [B], or pictures [B, C, H, W] that are
    none of it (ViLT's code takes any image of the data set); `mlm_patches` and `itm_patches`.
    """

    config: ViltObjectives

    def draw(self, batch: PairBatch) -> Drawn:
        masked = mlm_patches = itm_patches = images = None
        matches_B = torch.ones(batch.rows, dtype=torch.bool, device=batch.device)
        if "mlm" in self.config.losses:
            rule = whole_words(self.config.mask_positions)
            masked = self.masked(batch.ids_BT, self.config.mask_rate, rule)
            mlm_patches = self._patches("mlm_patches", batch.images)
        if not self.config.losses.keys().isdisjoint({"itm", "wpa"}):
            matches_B, images = self._half_wrong(batch)
            itm_patches = self._patches("itm_patches", images)
        hidden = matches_B.sum() if masked is None else num_hidden(masked.labels_BT)
        return Drawn(masked, matches_B, images, mlm_patches, itm_patches, hidden)

    def losses_of(self, batch: PairBatch, drawn: Drawn, rows: int) -> LossesAndMetrics:
        """The part that these pairs have in the losses over `rows` pairs with `drawn.hidden` hidden tokens."""
        hidden = drawn.hidden
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if drawn.masked is not None:
            states = self._fuse(batch.images, drawn.mlm_patches, drawn.masked.ids_BT, batch.mask_BT)
            logits, labels = self.model.guess_words(states[:, : batch.ids_BT.shape[1]]), drawn.masked.labels_BT
            mine = num_hidden(labels)
            # A chunk of short texts may have no hidden word, of which there is no mean.
            loss = torch.where(mine > 0, mlm(logits, labels), 0.0) * mine / hidden.clamp(min=1)
            losses["mlm"] = loss * self.config.weight_of_mean(hidden.to(loss.dtype))
            right = ((logits.detach().argmax(dim=2) == labels) & (labels >= 0)).sum()
            metrics["mlm_accuracy"] = right / hidden.clamp(min=1)
        if drawn.images is not None:
            share = batch.rows / rows
            states = self._fuse(drawn.images, drawn.itm_patches, batch.ids_BT, batch.mask_BT)
            if "itm" in self.config.losses:
                logits = at_least_fp32(self.model.match(states))
                losses["itm"] = F.cross_entropy(logits, drawn.matches_B.long()) * share
                metrics["itm_accuracy"] = (logits.argmax(dim=1) == drawn.matches_B).float().mean() * share
            if "wpa" in self.config.losses:
                there_BN = self._there(drawn.images, drawn.itm_patches)
                losses["wpa"] = wpa(_costs(states, batch.mask_BT, there_BN), drawn.matches_B) * share
        return losses, metrics

    def _fuse(self, images: Tensor, patches_BK: Tensor | None, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        tokens = self.model.encode_image(images, patches_BK)
        return self.model.fuse(ids_BT, mask_BT, self.model.image_context(tokens, "encoder"))

    def _there(self, images: Tensor, patches_BK: Tensor | None) -> Tensor:
        there_BN = self.model.patches_there(images).flatten(1)
        return there_BN if patches_BK is None else there_BN.gather(1, patches_BK)

    @torch.no_grad()
    def _patches(self, name: str, images: Tensor) -> Tensor | None:
        """As many of each picture's patches as are read, in random order, padding last; None for all."""
        there_BN, most = self.model.patches_there(images).flatten(1), self.config.max_patches

        def draw() -> Tensor | None:
            if not most or there_BN.shape[1] <= most:
                return None
            keys_BN = torch.rand(there_BN.shape, device=images.device).masked_fill(~there_BN, 2.0)
            return keys_BN.argsort(dim=1)[:, :most]

        return self.draws.take(name, draw)

    @torch.no_grad()
    def _half_wrong(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """For half of the pairs, rounded down, their images, for the others another one; and which pairs match. Where
        all pairs are of one image, all match."""
        others_BB = (batch.image_ids_B[:, None] != batch.image_ids_B[None, :]).float()
        alone_B1 = others_BB.sum(dim=1, keepdim=True) == 0

        def draw_half() -> Tensor:
            return (torch.randperm(batch.rows, device=batch.device) < batch.rows // 2) | alone_B1[:, 0]

        def draw_other() -> Tensor:
            return one_of_each_row(others_BB + alone_B1)

        matches_B = self.draws.take("matches", draw_half)
        wrong = self.draws.take("wrong_images", draw_other)
        if not wrong.is_floating_point():
            wrong = batch.images.index_select(0, wrong)
        images, wrong = _alike(batch.images, wrong)
        return matches_B, torch.where(matches_B[:, None, None, None], images, wrong)


class ViltRetrieval(PairsApart):
    """A ViLT that ranks the text of an image above wrong ones, by a cross-entropy over the numbers of its head `rank`.

    Its draw is `wrong_texts`: rows [B, K] among those of all processes, or texts that are none of them, as ids and mask
    [B, K, T] (ViLT's code takes any texts of the data set, as this does of the global batch).
    """

    config: ViltRetrievalObjectives

    def __init__(self, model: Vilt, config: ViltRetrievalObjectives, prompt: int = 0):
        super().__init__(model, config, prompt)
        if model.match_head is not None:
            model.match_head.requires_grad_(False)

    def draw(self, batch: PairBatch) -> WrongTexts:
        """The wrong texts of these pairs, each of another image; the same one may be drawn twice."""
        others_BN = (batch.image_ids_B[:, None] != gather(batch.image_ids_B)[None, :]).float()
        alone_B1 = others_BN.sum(dim=1, keepdim=True) == 0

        def draw() -> Tensor:
            return torch.multinomial(others_BN + alone_B1, self.config.wrong_texts, replacement=True)

        taken: Tensor | tuple[Tensor, Tensor] = self.draws.take("wrong_texts", draw)
        if isinstance(taken, Tensor):
            taken = gather(as_wide(batch.ids_BT))[taken], gather(as_wide(batch.mask_BT))[taken]
        return WrongTexts(taken[0], taken[1], alone_B1[:, 0].long() * LEFT_OUT)

    def losses_of(self, batch: PairBatch, drawn: WrongTexts, rows: int) -> LossesAndMetrics:
        ids, mask = _beside(batch.ids_BT, drawn.ids_BKT), _beside(batch.mask_BT, drawn.mask_BKT)
        context = self.model.image_context(self.model.encode_image(batch.images), "encoder")
        logits = at_least_fp32(self.model.match(self.model.fuse(ids, mask, context)))[:, 1].view(batch.rows, -1)
        loss = F.cross_entropy(logits, drawn.labels_B, ignore_index=LEFT_OUT, reduction="sum") / rows
        return {"rank": loss}, {"rank_accuracy": (logits.detach().argmax(dim=1) == drawn.labels_B).sum() / rows}


def _beside(x_BT: Tensor, wrong_BKT: Tensor) -> Tensor:
    """Texts, each followed by its wrong ones, padded to one length: [B * (1 + K), T]."""
    width = max(x_BT.shape[1], wrong_BKT.shape[2])
    right, wrong = (F.pad(x, (0, width - x.shape[-1])) for x in (x_BT, wrong_BKT))
    return torch.cat([right[:, None], wrong], dim=1).flatten(0, 1)


def _alike(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of pictures, padded to one shape where they have not the same."""
    if images.shape == others.shape:
        return images, others
    height, width = (max(images.shape[axis], others.shape[axis]) for axis in (2, 3))
    with_mask = (x if x.shape[1] == 4 else torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in (images, others))
    first, second = (F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in with_mask)
    return first, second


def _costs(states_BND: Tensor, mask_BT: Tensor, there_BN: Tensor) -> Tensor:
    """The costs of transporting words to patches, [B], without [CLS], [SEP] and I_CLS."""
    T = mask_BT.shape[1]
    places = torch.arange(T, device=mask_BT.device)
    words_BT = (places > 0) & (places < mask_BT.sum(dim=1, keepdim=True) - 1)
    return transport_cost(states_BND[:, :T], states_BND[:, T + 1 :], words_BT, there_BN)
