"""From pictures and prompts to the tensors of a vision-language model, by the processor that lies beside its weights.

Each prompt is made into tensors alone and stacked afterwards, so its tensors do not depend on its neighbours. Pictures
go through Pillow on every machine: torchvision resizes a little otherwise, and may be there on one worker alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.storage.documents import read_model_object

Inputs: TypeAlias = dict[str, Tensor]
"""What a model takes of one or several prompts, by the names of its arguments; one row a prompt, or as many in turn as
its picture has patches."""

MAX_PADDING = 0.1
"""The share of padding that a batch may have: prompts of other lengths are no neighbours."""
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class Processor:
    """The processor of a saved model."""

    def __init__(self, folder: Path):
        """Raises ModelError where the folder has none that can be used."""
        self.inner = load_processor(folder)
        self.tokenizer: Any = getattr(self.inner, "tokenizer", self.inner)
        self.has_chat = bool(getattr(self.inner, "chat_template", None) or self.tokenizer.chat_template)
        self.image_token: str = getattr(self.inner, "image_token", None) or ""
        end = self.tokenizer.eos_token_id
        self.pad: int = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (end or 0)
        self.special_tokens = sorted({str(token) for token in self.tokenizer.added_tokens_decoder.values()}, key=len)

    def inputs(self, picture: Image.Image, prompt: str) -> Inputs:
        """The tensors of one picture and what is asked of it, in the model's chat where it has one.

        Raises:
            ValueError: a picture that the processor refuses.
        """
        if self.has_chat:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
            found = self.inner.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            text = f"{self.image_token}\n{prompt}" if self.image_token else prompt
            found = self.inner(images=[picture], text=[text], return_tensors="pt")
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stack(self, rows: Sequence[Inputs]) -> Inputs:
        """The tensors of several prompts whose `shape` is one; shorter ones are padded on the left."""
        longest = max(length(row) for row in rows)

        def padded(name: str, row: Inputs) -> Tensor:
            value = row[name]
            if value.shape != row["input_ids"].shape:
                return value
            fill = self.pad if name == "input_ids" else 0
            return torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill)

        return {name: torch.cat([padded(name, row) for row in rows]) for name in rows[0]}


def length(inputs: Inputs) -> int:
    """The tokens of one prompt, those of its picture among them."""
    return inputs["input_ids"].shape[1]


def shape(inputs: Inputs) -> tuple[object, ...]:
    """What prompts have in common that can be stacked: the names of their tensors, and the sizes of a picture's."""
    tokens = inputs["input_ids"].shape
    return tuple((name, *value.shape[1:]) for name, value in sorted(inputs.items()) if value.shape != tokens)


def batches(rows: Sequence[Inputs], most: int) -> list[list[int]]:
    """The numbers of rows that are computed together: at most `most`, of one shape and of nearly one length."""
    order = sorted(range(len(rows)), key=lambda i: (repr(shape(rows[i])), length(rows[i]), i))
    found: list[list[int]] = []
    for i in order:
        newest = found[-1] if found else []
        fits = newest and len(newest) < most and shape(rows[newest[0]]) == shape(rows[i])
        if fits and length(rows[newest[0]]) >= (1 - MAX_PADDING) * length(rows[i]):
            newest.append(i)
        else:
            found.append([i])
    return found


def load_processor(folder: Path) -> Any:
    """The processor of transformers that a folder describes.

    Raises:
        ModelError: none is described, or it needs what is not installed.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)
    except ImportError as error:
        if not re.search("torchvision|video", str(error), re.IGNORECASE):
            raise ModelError(f"{folder}: its processor needs more than is installed: {_line(error)}") from None
        return _without_videos(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder} has no processor that can be used: {_line(error)}") from None


def _without_videos(folder: Path) -> Any:
    """A processor of pictures and videos without its part for videos, which needs torchvision: none is shown to it."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    described = [read_model_object(folder / name) for name in _PROCESSORS if (folder / name).is_file()]
    name = next((str(known["processor_class"]) for known in described if known.get("processor_class")), "")
    kind: Any = getattr(transformers, name, None)
    try:
        if kind is None or transformers.ProcessorMixin not in kind.__mro__:
            raise ValueError(f"transformers has no processor {name!r}")
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True),
            "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True),
            "video_processor": None,
        }
        settings, _ = kind.get_processor_dict(folder)
        unchecked = {"check_argument_for_proper_class": lambda self, name, part: None}  # which refuses None
        kind = type(name, (kind,), unchecked)
        return kind.from_args_and_dict([parts[part] for part in kind.get_attributes()], settings)
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder} has no processor that can be used without torchvision: {_line(error)}") from None


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
