"""The momentum encoder and its queues (ALBEF section 3.2; BLIP section 3.2 keeps both).

A slow copy of the model's two encoders gives ITC steady keys and soft targets; queues of its past features give many
negatives at the cost of a matrix product. The copy is made after the parts are tied, so online and momentum weights
start equal (in the public BLIP code 13 tensors differ, because it copies before tying).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import RecipeError
from capfilt.models import ArchitectureConfig, Model, build
from capfilt.objectives.collectives import gather

NO_IMAGE = -100
"""The group of a queue's random first rows, which no image has."""


class Momentum(nn.Module):
    """Exponential moving average of the encoders, and first-in-first-out queues of their features.

    Queues are [size, width], unit rows, random at the start as in the public code; `width` is that of the features.
    `image_ids` keeps beside them of which images they are, [size], -100 where they are of none yet.
    """

    queue_image: Tensor
    queue_text: Tensor
    queue_groups: Tensor | None
    pointer: Tensor

    def __init__(
        self,
        model: Model,
        decay: float,
        queue: int,
        image_ids: bool = False,
        config: ArchitectureConfig | None = None,
    ):
        """`config`: the parts of the model that are copied; None: those of a filter."""
        super().__init__()
        self.decay = decay
        self.model = build(model.config.for_role("filter") if config is None else config)
        online = model.state_dict()
        self.model.load_state_dict({name: online[name] for name in self.model.state_dict()})
        self.model.requires_grad_(False)
        for name in ("queue_image", "queue_text"):
            self.register_buffer(name, F.normalize(torch.randn(queue, model.config.feature_width), dim=-1))
        self.register_buffer("queue_groups", torch.full((queue,), NO_IMAGE) if image_ids else None)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Move the copy towards the model: p_m <- decay p_m + (1 - decay) p; before a step's features are taken."""
        online = dict(model.named_parameters())
        mine = list(self.model.named_parameters())
        torch._foreach_lerp_([p for _, p in mine], [online[n].detach() for n, _ in mine], 1.0 - self.decay)

    @torch.no_grad()
    def features(self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts by the slow encoders, two of [B, width]."""
        image = self.model.project_image(self.model.encode_image(images_B3SS))
        text = self.model.project_text(self.model.encode_text(ids_BT, mask_BT))
        return image, text

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, image_ids: Tensor | None = None) -> None:
        """Put this step's features of all ranks into the queues, over the oldest; after the loss is taken.

        Features that are not finite stay outside: such a step is left out, and from the queue they would spoil the
        steps of a whole turn. All ranks see the same ones, and so do the same.
        """
        size = self.queue_image.shape[0]
        if size == 0:
            return
        image, text = gather(image), gather(text)
        rows = image.shape[0]
        if size % rows:
            raise RecipeError(
                f"queue {size} is not a multiple of the global batch {rows}; change one of them (57600 = 20 x 2880)"
            )
        finite = image.isfinite().all() & text.isfinite().all()  # not read, or the host would wait for it each step
        place_R = (self.pointer + torch.arange(rows, device=image.device)) % size
        queues = [(self.queue_image, image), (self.queue_text, text)]
        if self.queue_groups is not None and image_ids is not None:
            queues.append((self.queue_groups, gather(image_ids)))
        for queue, newest in queues:
            queue.index_copy_(0, place_R, torch.where(finite, newest.to(queue.dtype), queue[place_R]))
        self.pointer.add_(rows * finite).remainder_(size)
