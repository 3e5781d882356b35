"""A batch in pieces that learns what the batch as a whole would: cached features, as in GradCache (arXiv 2101.06983).

A contrastive loss is not a mean over pieces: every pair is a negative of every other. So the towers first go through
all pieces without a graph; the losses are taken on what came out, which gives the gradients of the features; and the
towers go through the pieces again, with a graph, to carry these on. BLIP's ITM and LM look at image tokens, so tokens
are what is cached of images, and a wrong image's gradient goes to whichever piece it is of. Memory is that of one
piece and the tokens of all; the price is a second forward pass of the vision tower and of the text encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from capfilt.errors import RecipeError
from capfilt.models.layers.image_context import ImageContext
from capfilt.objectives.collectives import all_reduce_sum
from capfilt.objectives.losses.itm import Negatives, itm
from capfilt.objectives.losses.lm import lm, num_targets
from capfilt.objectives.tasks.blip import BlipPretraining, LossesAndMetrics, ObjectivesConfig, share_of
from capfilt.objectives.tasks.blip2 import Blip2Stage1, Blip2Stage2, Pretraining

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images [B, 3, S, S], ids and mask [B, T], groups [B]."""

Precision = Callable[[], AbstractContextManager[object]]
"""Makes the context in which forward passes run."""


def cannot(family: str, language: bool, config: ObjectivesConfig) -> str:
    """Why such a training cannot go through a batch in pieces, as half a sentence; "" where it can."""
    if family != "blip" and not language:
        return "BLIP-2's first stage compares all queries with all texts of the batch and is not cut"
    if config.negatives == "all":
        return "objectives.negatives 'all' takes images of other processes, whose gradients are gathered once a step"
    return ""


def backward_in_chunks(
    learner: Pretraining, batch: Batch, progress: float, pieces: int, precision: Precision
) -> LossesAndMetrics:
    """Add the gradients of the learner's loss over the whole batch to its weights; losses and figures as `forward`.

    Draws (dropout) are those of a piece in its own turn, so with them the batch as a whole would have seen others.

    Raises:
        RecipeError: a learner that cannot; whoever reads a recipe has asked `cannot` before.
    """
    B = batch[1].shape[0]
    if B % pieces:
        raise RecipeError(f"a process has {B} pairs of a batch, which micro_batches {pieces} does not divide")
    rows = [slice(start, start + B // pieces) for start in range(0, B, B // pieces)]
    if isinstance(learner, Blip2Stage2):
        return _means(learner, batch, progress, rows, precision)
    if isinstance(learner, Blip2Stage1) or learner.config.negatives == "all":
        raise RecipeError("this training cannot go through a batch in pieces: set micro_batches to 1")
    return _Cached(learner, batch, rows, precision).learn(progress)


def _means(
    learner: Blip2Stage2, batch: Batch, progress: float, rows: list[slice], precision: Precision
) -> LossesAndMetrics:
    """LM alone is a mean over tokens: pieces weigh as many as they have, here or on all processes."""
    counts = torch.stack([batch[2][own, learner.prompt :].sum() for own in rows])
    if learner.config.mean_over == "all":
        counts = all_reduce_sum(counts)
    whole = torch.zeros((), device=batch[0].device)
    for own, count in zip(rows, counts.unbind(), strict=True):
        with precision():
            losses, _ = learner(*(x[own] for x in batch), progress)
            share_of_total = count / counts.sum()
            loss = learner.total({"lm": losses["lm"] * share_of_total})
        loss.backward()
        whole += losses["lm"].detach() * share_of_total
    return {"lm": whole}, {}


class _Cached:
    """One step of BLIP's learner in pieces."""

    def __init__(self, learner: BlipPretraining, batch: Batch, rows: list[slice], precision: Precision):
        self.learner, self.model, self.rows, self.precision = learner, learner.model, rows, precision
        self.images, self.ids, self.mask, self.image_ids = batch
        self.before: list[Draws] = []
        self.losses: dict[str, Tensor] = {}
        self.figures: dict[str, Tensor] = {}

    def learn(self, progress: float) -> LossesAndMetrics:
        """Embed, compare, look and write, carry back."""
        self.learner.begin()
        tokens, text = self._embed()
        token_gradients = torch.zeros_like(tokens)
        similar, text_gradients = None, None
        if text is not None:
            similar, text_gradients = self._compare(tokens, text, token_gradients, progress)
        if self.learner.config.losses.keys() & {"itm", "lm"}:
            self._ground(tokens, similar, token_gradients)
        self._carry_back(token_gradients, text_gradients)
        return {name: self.losses[name] for name in self.learner.config.losses}, self.figures

    @torch.no_grad()
    def _embed(self) -> tuple[Tensor, Tensor | None]:
        """Image tokens [B, N, D], and text features [B, P] where ITC wants them."""
        tokens, text = [], []
        for own in self.rows:
            self.before.append(Draws(self.images.device))
            with self.precision():
                found = self._through(own)
            tokens.append(found[0])
            text += found[1:]
        return torch.cat(tokens), torch.cat(text) if text else None

    def _through(self, own: slice) -> list[Tensor]:
        """The two towers, of one piece."""
        out = [self.model.encode_image(self.images[own])]
        if self.learner.momentum is not None:
            out.append(self.model.project_text(self.model.encode_text(self.ids[own], self.mask[own])))
        return out

    def _compare(
        self, tokens: Tensor, text: Tensor, token_gradients: Tensor, progress: float
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """ITC over all pairs at once; gradients of [CLS] tokens and of text features."""
        assert self.learner.momentum is not None
        cls, text = tokens[:, :1].clone().requires_grad_(), text.clone().requires_grad_()
        with self.precision():
            slow = [
                self.learner.momentum.features(self.images[own], self.ids[own], self.mask[own]) for own in self.rows
            ]
            slow_image, slow_text = (torch.cat(parts) for parts in zip(*slow, strict=True))
            image = self.model.project_image(cls)
            loss, similar = self.learner.compare(image, text, (slow_image, slow_text), self.image_ids, progress)
            weighted = loss * self.learner.config.losses["itc"]
        weighted.backward()
        self.losses["itc"] = loss.detach()
        assert cls.grad is not None
        assert text.grad is not None
        token_gradients[:, :1] += cls.grad
        return similar, text.grad

    def _ground(self, tokens: Tensor, similar: tuple[Tensor, Tensor] | None, token_gradients: Tensor) -> None:
        """ITM and LM, piece by piece, on the cached tokens."""
        losses, config = self.learner.config.losses, self.learner.config
        drawn = self.learner.draw(similar, self.image_ids) if "itm" in losses else None
        pairs = self._pairs_asked(drawn) if drawn else None
        words = num_targets(self.ids, self.mask, self.learner.prompt)
        for own in self.rows:
            mine = tokens[own].clone().requires_grad_()
            theirs = tokens[drawn[0][own]].requires_grad_() if drawn else None
            with self.precision():
                parts: dict[str, Tensor] = {}
                keys = None
                if drawn and theirs is not None and pairs is not None:
                    keys = self.model.image_context(mine, "encoder")
                    wrong = self._wrong(own, theirs, drawn)
                    loss, right = itm(self.model, self.ids[own], self.mask[own], keys, wrong)
                    parts["itm"] = loss * (wrong.num_targets / pairs) * share_of(pairs, config)
                    self._add("itm_accuracy", right * (wrong.num_targets / pairs), self.figures)
                if "lm" in losses:
                    parts["lm"] = self._written(own, mine, keys) * (share_of(words, config) / words)
                total = self.learner.total(parts)
            total.backward()
            for name, loss in parts.items():
                self._add(name, loss, self.losses)
            assert mine.grad is not None
            token_gradients[own] += mine.grad
            if drawn and theirs is not None:
                assert theirs.grad is not None
                token_gradients.index_add_(0, drawn[0][own], theirs.grad)

    def _pairs_asked(self, drawn: tuple[Tensor, Tensor]) -> Tensor:
        """How many of all pairs, right and wrong ones, ITM is the mean of."""
        wrong = [(self.image_ids[indices] != self.image_ids).sum() for indices in drawn]
        return self.image_ids.numel() + wrong[0] + wrong[1]

    def _wrong(self, own: slice, theirs: Tensor, drawn: tuple[Tensor, Tensor]) -> Negatives:
        images, texts = (indices[own] for indices in drawn)
        return Negatives(
            image_context=self.model.image_context(theirs, "encoder"),
            ids_BT=self.ids[texts],
            mask_BT=self.mask[texts],
            image_is_wrong_B=self.image_ids[images] != self.image_ids[own],
            text_is_wrong_B=self.image_ids[texts] != self.image_ids[own],
        )

    def _written(self, own: slice, mine: Tensor, keys: ImageContext | None) -> Tensor:
        """The sum of LM over the tokens of a piece."""
        ids, mask, learner = self.ids[own], self.mask[own], self.learner
        if keys is None or not self.model.shares_image_context:
            keys = self.model.image_context(mine, "decoder")
        loss = lm(self.model.decode(ids, mask, keys), ids, mask, learner.prompt, smoothing=learner.config.smoothing)
        return loss * num_targets(ids, mask, learner.prompt)

    def _carry_back(self, token_gradients: Tensor, text_gradients: Tensor | None) -> None:
        """The towers again, each piece with the draws that it had, and its gradients back through them."""
        for own, draws in zip(self.rows, self.before, strict=True):
            after = Draws(self.images.device)
            draws.again()
            with self.precision():
                out = self._through(own)
            after.again()
            wanted = [token_gradients[own]] + ([] if text_gradients is None else [text_gradients[own]])
            torch.autograd.backward(out, [g.to(x.dtype) for g, x in zip(wanted, out, strict=True)])

    def _add(self, name: str, value: Tensor, to: dict[str, Tensor]) -> None:
        value = value.detach()
        to[name] = to[name] + value if name in to else value


class Draws:
    """The state of torch's generators, of the CPU and of a GPU that is used."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if self.device else None

    def again(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        if self.device and self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)
