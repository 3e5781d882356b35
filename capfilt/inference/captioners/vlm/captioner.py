"""A captioner that is a vision-language model of transformers: any that takes a picture and a text and answers.

transformers' own `generate` runs the model, with its caches and positions; which token comes next is decided here, by
the draws of (seed, round, uid, candidate), so that kills and batch sizes change no text.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.errors import ModelError
from capfilt.inference.batches import Images
from capfilt.inference.captioners import prompts
from capfilt.inference.captioners.guard_rails import guard
from capfilt.inference.captioners.prompts import Prompt
from capfilt.inference.captioners.vlm.inputs import Inputs, Processor, batches, length
from capfilt.inference.config import AnnotateConfig, DecodeConfig
from capfilt.inference.generation.decode import FiniteLogits, next_token, uniforms
from capfilt.inference.generation.runner import MIN_ROWS
from capfilt.inference.generation.sampling import penalise
from capfilt.inference.interface import Caption

THREADS = 2
"""Pictures that are made ready at a time."""


@dataclass(frozen=True)
class _Answer:
    """One answer to be written."""

    image: int
    """The number of its image in the batch."""
    candidate: int
    prompt: Prompt
    inputs: Inputs | None
    """None where nothing can be asked, for `fault`."""
    fault: str = ""


class VlmCaptioner:
    """Writes `captions` texts per image; the same for the same (seed, round, uid) in any batch, up to rounding."""

    def __init__(self, model: Any, processor: Processor, config: AnnotateConfig, seed: int = 0, round_: int = 0):
        self.model, self.processor, self.config = model, processor, config
        self.seed, self.round = seed, round_
        self.ends = _end_tokens(model, processor)
        self.model.generation_config = GenerationConfig()  # its own would fill in what is not said, penalties too
        self.templates = prompts.templates(config.vlm)
        self._check()

    @classmethod
    def load(
        cls, folder: Path, config: AnnotateConfig, seed: int, round_: int, device: torch.device, dtype: torch.dtype
    ) -> VlmCaptioner:
        """A saved model on a device, in the format that it is to compute in. ModelError where it cannot be read."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ModelError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        return cls(model.eval().to(device), Processor(folder), config, seed, round_)

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        """None: its own processor makes them of a sample's bytes."""
        return ()

    def prepare(self, images: Images) -> None:
        """Nothing depends on the images alone."""

    @torch.inference_mode()
    def caption(self, images: Images, samples: Sequence[Sample]) -> list[list[Caption]]:
        """`captions` texts for each image, each the answer to its prompt."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="vlm") as pool:
            answers = [
                answer for of_image in pool.map(self._answers, range(len(samples)), samples) for answer in of_image
            ]
        rows = [answer for answer in answers if answer.inputs is not None and self._is_drawn(answer)]
        written: dict[tuple[int, int], str] = {}
        for numbers in batches([row.inputs or {} for row in rows], len(samples)):
            batch = [rows[i] for i in numbers]
            ids = self._generate([row.inputs or {} for row in batch], [self._draws(samples, row) for row in batch])
            written |= {
                (row.image, row.candidate): self.processor.text(of_row) for row, of_row in zip(batch, ids, strict=True)
            }
        captions: list[list[Caption]] = [[] for _ in samples]
        for answer in answers:
            key = (answer.image, answer.candidate if self._draws_at_random else self._first(answer))
            captions[answer.image].append(self._caption(answer, written.get(key, ""), samples[answer.image]))
        return captions

    @property
    def _draws_at_random(self) -> bool:
        return self.config.decode.method == "nucleus"

    def _first(self, answer: _Answer) -> int:
        """The first candidate with the same prompt, of which greedy writes one text."""
        return answer.candidate % len(self.config.vlm.prompts)

    def _is_drawn(self, answer: _Answer) -> bool:
        return self._draws_at_random or answer.candidate == self._first(answer)

    def _draws(self, samples: Sequence[Sample], answer: _Answer) -> np.ndarray:
        steps = self.config.vlm.max_new_tokens
        return uniforms(self.seed, self.round, samples[answer.image].uid, answer.candidate, steps)

    def _answers(self, number: int, sample: Sample) -> list[_Answer]:
        """What is asked of one image, for each of its captions."""
        asked = prompts.prompts_of(sample, self.config.captions, self.config.vlm, self.processor.special_tokens)
        picture, known = decode.decode(sample.image), dict[str, tuple[Inputs | None, str]]()
        for prompt in asked:
            if prompt.text not in known:
                known[prompt.text] = self._inputs(picture, prompt.text)
        return [_Answer(number, c, prompt, *known[prompt.text]) for c, prompt in enumerate(asked)]

    def _inputs(self, picture: Image.Image, prompt: str) -> tuple[Inputs | None, str]:
        try:
            inputs = self.processor.inputs(picture, prompt)
        except ValueError:  # what processors raise of a picture that is too long for its width
            return None, "picture refused"
        positions = _positions(self.model)
        if positions and length(inputs) + self.config.vlm.max_new_tokens > positions:
            return None, "prompt too long"
        return inputs, ""

    def _caption(self, answer: _Answer, text: str, sample: Sample) -> Caption:
        kind = answer.prompt.kind
        if answer.inputs is None:
            return Caption("", kind, f"caption failed: {answer.fault}")
        asked = prompts.instruction(self.templates[kind])
        left = guard(text, self.config.vlm, asked, prompts.web_text(sample))
        return Caption(left.text, kind, left.remark)

    def _generate(self, rows: Sequence[Inputs], draws: Sequence[np.ndarray]) -> list[list[int]]:
        """The tokens of each row's answer, without the one that ends it."""
        device = self.model.device
        copies = -(-MIN_ROWS // len(rows)) if device.type == "cpu" else 1
        inputs = self.processor.stack([*rows] * copies)
        chooser = _NextTokens(self.config.decode, torch.from_numpy(np.stack([*draws] * copies)).to(device))
        settings = GenerationConfig(
            max_new_tokens=self.config.vlm.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.ends,
            pad_token_id=self.processor.pad,
            stop_strings=list(self.config.vlm.stop) or None,
        )
        with torch.autocast(device.type, enabled=False):  # the weights have the format already
            ids = self.model.generate(
                **{name: self._moved(value) for name, value in inputs.items()},
                generation_config=settings,
                logits_processor=LogitsProcessorList([chooser]),
                tokenizer=self.processor.tokenizer,
            )
        chooser.finite.check()
        written = ids[: len(rows), -len(chooser.chosen) :].tolist()
        return [_until(row, {*self.ends, self.processor.pad}) for row in written]

    def _moved(self, value: Tensor) -> Tensor:
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(self.model.device, dtype)

    def _check(self) -> None:
        """Refuse a processor that makes no inputs of a plain picture, or too many tokens of it; ModelError."""
        picture = Image.new("RGB", (224, 224), (127, 127, 127))
        try:
            made = self.processor.inputs(picture, self.templates[prompts.IGNORE])
        except Exception as error:
            raise ModelError(f"the captioner's processor fails on a plain picture: {error}") from error
        if "input_ids" not in made:
            raise ModelError(f"the captioner's processor makes no input_ids, but {', '.join(made)}")
        positions = _positions(self.model)
        if positions and length(made) + self.config.vlm.max_new_tokens > positions:
            raise ModelError(
                f"the captioner has {positions} positions, and a picture with its prompt takes {length(made)} of them:"
                f" that leaves no vlm.max_new_tokens={self.config.vlm.max_new_tokens}"
            )


class _NextTokens(LogitsProcessor):
    """Chooses each row's next token by its own draws, and leaves that one alone possible."""

    def __init__(self, config: DecodeConfig, draws_RS: Tensor):
        self.config, self.draws_RS = config, draws_RS
        self.chosen: list[Tensor] = []
        self.finite = FiniteLogits.on(draws_RS.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [R, V] -> the same with -inf but at the chosen tokens."""
        logits = scores.float()
        self.finite.watch(logits)
        if self.config.repetition_penalty != 1.0 and self.chosen:
            logits = penalise(logits, torch.stack(self.chosen, dim=1), self.config.repetition_penalty)
        token = next_token(logits, self.config, self.draws_RS[:, len(self.chosen)])
        self.chosen.append(token)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def _until(ids: list[int], ends: Container[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _end_tokens(model: Any, processor: Processor) -> list[int]:
    """The tokens that end an answer: those that the model names, and the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [*named] if isinstance(named, list | tuple) else [named]
    return sorted({int(end) for end in (*ends, processor.tokenizer.eos_token_id) if end is not None})


def _positions(model: Any) -> int:
    """How many tokens a model reads and writes together; 0 where it does not say."""
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", 0) or 0)
