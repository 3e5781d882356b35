"""A batch in chunks that learns what the batch as a whole would: cached features, as in GradCache (arXiv 2101.06983).

A contrastive loss is not a mean over chunks: every pair is a negative of every other. So the towers first go through
all chunks without a graph; the losses are taken on what came out, which gives the gradients of the features; and the
towers go through the chunks again, with a graph, to carry these on. BLIP's ITM and LM attend to image tokens, so tokens
are what is cached of images, and a negative image's gradient goes to whichever chunk it is of. Memory is that of one
chunk and the tokens of all; the price is a second forward pass of the vision tower and of the text encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Precision
from capfilt.objectives.losses.itm import Negatives, itm
from capfilt.objectives.losses.lm import lm, num_targets

if TYPE_CHECKING:
    from capfilt.objectives.tasks.blip import BlipPretraining
    from capfilt.objectives.tasks.clip import ClipPretraining


class CachedStep:
    """One step of BLIP's pretraining in chunks."""

    def __init__(self, task: BlipPretraining, batch: PairBatch, rows: list[slice], precision: Precision):
        self.task, self.model, self.rows, self.precision = task, task.model, rows, precision
        self.images, self.ids, self.mask, self.image_ids = batch
        self.before: list[GeneratorStates] = []
        self.losses: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}

    def backward(self, progress: float) -> LossesAndMetrics:
        """Encode, compare, match and decode, carry back: the gradients of the whole batch, its losses and metrics."""
        self.task.before_step()
        tokens, text = self._encode()
        token_gradients = torch.zeros_like(tokens)
        similar, text_gradients = None, None
        if text is not None:
            similar, text_gradients = self._compare(tokens, text, token_gradients, progress)
        if self.task.config.losses.keys() & {"itm", "lm"}:
            self._match_and_decode(tokens, similar, token_gradients)
        self._carry_back(token_gradients, text_gradients)
        return {name: self.losses[name] for name in self.task.config.losses}, self.metrics

    @torch.no_grad()
    def _encode(self) -> tuple[Tensor, Tensor | None]:
        """Image tokens [B, N, D], and text features [B, P] where ITC wants them."""
        tokens, text = [], []
        for rows in self.rows:
            self.before.append(GeneratorStates(self.images.device))
            with self.precision():
                towers = self._through(rows)
            tokens.append(towers[0])
            text += towers[1:]
        return torch.cat(tokens), torch.cat(text) if text else None

    def _through(self, rows: slice) -> list[Tensor]:
        """The two towers, of one chunk."""
        out = [self.model.encode_image(self.images[rows])]
        if self.task.momentum is not None:
            out.append(self.model.project_text(self.model.encode_text(self.ids[rows], self.mask[rows])))
        return out

    def _compare(
        self, tokens: Tensor, text: Tensor, token_gradients: Tensor, progress: float
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """ITC over all pairs at once; gradients of [CLS] tokens and of text features."""
        assert self.task.momentum is not None
        cls, text = tokens[:, :1].clone().requires_grad_(), text.clone().requires_grad_()
        with self.precision():
            slow = [
                self.task.momentum.features(self.images[rows], self.ids[rows], self.mask[rows]) for rows in self.rows
            ]
            slow_image, slow_text = (torch.cat(parts) for parts in zip(*slow, strict=True))
            image = self.model.project_image(cls)
            loss, similar = self.task.compare(image, text, (slow_image, slow_text), self.image_ids, progress)
            weighted = loss * self.task.config.losses["itc"]
        weighted.backward()
        self.losses["itc"] = loss.detach()
        assert cls.grad is not None
        assert text.grad is not None
        token_gradients[:, :1] += cls.grad
        return similar, text.grad

    def _match_and_decode(self, tokens: Tensor, similar: tuple[Tensor, Tensor] | None, token_gradients: Tensor) -> None:
        """ITM and LM, chunk by chunk, on the cached tokens."""
        losses, config = self.task.config.losses, self.task.config
        dtype = at_least_fp32(tokens[:0]).dtype
        drawn = self.task.draw(similar, self.image_ids) if "itm" in losses else None
        pairs = self._num_pairs(drawn).to(dtype) if drawn else None
        targets = num_targets(self.ids, self.mask, self.task.prompt).to(dtype)
        for rows in self.rows:
            mine = tokens[rows].clone().requires_grad_()
            others = tokens[drawn[0][rows]].requires_grad_() if drawn else None
            with self.precision():
                parts: dict[str, Tensor] = {}
                context = None
                if drawn and others is not None and pairs is not None:
                    context = self.model.image_context(mine, "encoder")
                    negatives = self._negatives(rows, others, drawn)
                    loss, right = itm(self.model, self.ids[rows], self.mask[rows], context, negatives)
                    parts["itm"] = loss * (negatives.num_targets / pairs) * config.weight_of_mean(pairs)
                    self._add("itm_accuracy", right * (negatives.num_targets / pairs), self.metrics)
                if "lm" in losses:
                    parts["lm"] = self._decoded(rows, mine, context) * (config.weight_of_mean(targets) / targets)
                total = self.task.total(parts)
            total.backward()
            for name, loss in parts.items():
                self._add(name, loss, self.losses)
            assert mine.grad is not None
            token_gradients[rows] += mine.grad
            if drawn and others is not None:
                assert others.grad is not None
                token_gradients.index_add_(0, drawn[0][rows], others.grad)

    def _num_pairs(self, drawn: tuple[Tensor, Tensor]) -> Tensor:
        """How many of all pairs, right and wrong ones, ITM is the mean of."""
        wrong = [(self.image_ids[indices] != self.image_ids).sum() for indices in drawn]
        return self.image_ids.numel() + wrong[0] + wrong[1]

    def _negatives(self, rows: slice, others: Tensor, drawn: tuple[Tensor, Tensor]) -> Negatives:
        images, texts = (indices[rows] for indices in drawn)
        return Negatives(
            image_context=self.model.image_context(others, "encoder"),
            texts=self.ids[texts],
            mask_BT=self.mask[texts],
            image_is_wrong_B=self.image_ids[images] != self.image_ids[rows],
            text_is_wrong_B=self.image_ids[texts] != self.image_ids[rows],
        )

    def _decoded(self, rows: slice, mine: Tensor, context: ImageContext | None) -> Tensor:
        """The sum of LM over the tokens of a chunk."""
        ids, mask, task = self.ids[rows], self.mask[rows], self.task
        if context is None or not self.model.shares_image_context:
            context = self.model.image_context(mine, "decoder")
        loss = lm(self.model.decode(ids, mask, context), ids, mask, task.prompt, smoothing=task.config.smoothing)
        return loss * num_targets(ids, mask, task.prompt)

    def _carry_back(self, token_gradients: Tensor, text_gradients: Tensor | None) -> None:
        """The towers again, each chunk with the draws that it had, and its gradients back through them."""
        for rows, before in zip(self.rows, self.before, strict=True):
            after = GeneratorStates(self.images.device)
            before.restore()
            with self.precision():
                out = self._through(rows)
            after.restore()
            wanted = [token_gradients[rows]] + ([] if text_gradients is None else [text_gradients[rows]])
            torch.autograd.backward(out, [g.to(x.dtype) for g, x in zip(wanted, out, strict=True)])

    def _add(self, name: str, value: Tensor, to: dict[str, Tensor]) -> None:
        value = value.detach()
        to[name] = to[name] + value if name in to else value


def backward_through_features(
    task: ClipPretraining, batch: PairBatch, chunks: int, precision: Precision
) -> LossesAndMetrics:
    """Add the gradients of a loss over the whole batch to the weights of a dual encoder, with the memory of a chunk."""
    parts, before, image, text = batch.chunks(chunks), list[GeneratorStates](), list[Tensor](), list[Tensor]()
    for rows in parts:
        before.append(GeneratorStates(batch.device))
        with torch.no_grad(), precision():
            of_images, of_texts = task.features(batch.select(rows))
        image.append(of_images)
        text.append(of_texts)
    cached = [torch.cat(features).requires_grad_() for features in (image, text)]
    with precision():
        losses, metrics = task.compare(cached[0], cached[1], batch.image_ids_B)
        total = task.total(losses)
    total.backward()
    for rows, draws in zip(parts, before, strict=True):
        after = GeneratorStates(batch.device)
        draws.restore()
        with precision():
            out = task.features(batch.select(rows))
        after.restore()
        torch.autograd.backward(out, [features.grad[rows] for features in cached if features.grad is not None])
    return {name: loss.detach() for name, loss in losses.items()}, metrics


class GeneratorStates:
    """The states of torch's generators, of the CPU's and of a GPU's that is used."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if self.device else None

    def restore(self) -> None:
        """Set the generators to it."""
        torch.set_rng_state(self.cpu)
        if self.device and self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)
