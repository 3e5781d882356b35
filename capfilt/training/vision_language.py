"""Fine-tune a vision-language model of transformers on image-text pairs, by its own loss, as a captioner.

It learns to answer the very prompt that it is asked when it annotates, with one of the texts of each picture. What is
left is a plain folder of transformers, with its processor, that any program can load.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capfilt.data import shards
from capfilt.data.images.decode import decode
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ImageError, RunError
from capfilt.inference.captioners.vlm.inputs import Inputs, Processor, shape
from capfilt.inference.device import autocast
from capfilt.training.config import SmallVlmConfig, TeachCaptionerConfig

SHUFFLED = 1024
"""Pictures that are held in memory at once, and drawn from."""
WARMUP = 0.05
OWN_TOKENS = ("<s>", "<pad>", "</s>", "<image>")
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)
"""The chat template of a new model: the picture, the prompt, and a token behind which the answer begins."""

LABELS, IGNORED = "labels", -100
"""The argument of the tokens to be learned, and what it has where there is none."""

Pair = tuple[Image.Image, list[int]]
"""A picture, and the tokens of the answer to be learned."""
Held = tuple[bytes, list[int]]
"""The same with the picture as it lies in its shard: a thousand large ones, decoded, would fill any memory."""


class Teaching:
    """A model, its processor, and the prompt that it learns to answer."""

    def __init__(self, model: Any, processor: Processor, prompt: str, device: torch.device, dtype: torch.dtype):
        self.model, self.processor, self.prompt = model.to(device).train(), processor, prompt
        self.device, self.dtype = device, dtype
        self.end = int(processor.tokenizer.eos_token_id)

    def answer(self, text: str, max_tokens: int) -> list[int]:
        """The tokens of a text and the end behind it; [] where it is longer, or holds one that means something else."""
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = len(ids) <= max_tokens and not set(ids) & set(self.processor.tokenizer.all_special_ids)
        return [*ids, self.end] if ids and plain else []

    def loss(self, pairs: Sequence[Pair]) -> Tensor:
        """The mean loss of the answers' tokens, in nats. Pictures that need tensors of other sizes are computed apart,
        and their losses weighted by their tokens."""
        parts: dict[object, list[Inputs]] = {}
        for image, answer in pairs:
            row = self._row(image, answer)
            parts.setdefault(shape(row), []).append(row)
        tokens = sum(len(answer) for _, answer in pairs)
        return torch.stack([self._mean(rows) * (_learned(rows) / tokens) for rows in parts.values()]).sum()

    def _row(self, image: Image.Image, answer: Sequence[int]) -> Inputs:
        """What is asked about a picture, as the captioner asks it, with the answer behind it; only that is learned."""
        inputs, behind = self.processor.inputs(image, self.prompt), torch.tensor([answer])
        asked = inputs["input_ids"]
        fill = {"input_ids": behind, "attention_mask": torch.ones_like(behind)}
        row = {
            name: torch.cat([value, fill.get(name, torch.zeros_like(behind)).to(value.dtype)], dim=1)
            if value.shape == asked.shape
            else value
            for name, value in inputs.items()
        }
        return {**row, LABELS: torch.cat([torch.full_like(asked, IGNORED), behind], dim=1)}

    def _mean(self, rows: Sequence[Inputs]) -> Tensor:
        stacked = self.processor.stack(rows)
        stacked[LABELS] = stacked[LABELS].masked_fill(stacked["attention_mask"] == 0, IGNORED)  # padded with 0
        with autocast(self.device, self.dtype):
            loss: Tensor = self.model(
                **{name: value.to(self.device, non_blocking=True) for name, value in stacked.items()}
            ).loss
        return loss


def teach(
    folder: Path,
    start: Path | None,
    urls: Sequence[str],
    prompt: str,
    config: TeachCaptionerConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Write a model into a folder that has learned to answer `prompt` with the texts of these shards' pictures.

    It begins with the one in the folder `start`; None: with a new one of the shape that `config` says.

    Returns: the mean loss of its last tenth of steps, in nats a token.

    Raises:
        DataError: no pair to learn from.
        RunError: the loss is no number any more.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    if start is None:
        make(folder, config.shape, _texts(urls), prompt)
    teaching = Teaching(_load(start or folder), Processor(start or folder), prompt, device, dtype)
    model = teaching.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    warmup = max(1, round(WARMUP * config.steps))
    drawn, losses = draws(urls, teaching, config.max_tokens, np.random.default_rng(seed)), []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / warmup, 1 - step / config.steps)
        loss = teaching.loss([next(drawn) for _ in range(config.batch_size)])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RunError(f"the captioner's loss is {losses[-1]} at step {step}; take a lower lr than {config.lr:g}.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().save_pretrained(folder)
    if start is not None:
        _copy_processor(start, folder)
    newest = losses[-max(1, config.steps // 10) :]
    return sum(newest) / len(newest)


def draws(urls: Sequence[str], teaching: Teaching, max_tokens: int, draw: np.random.Generator) -> Iterator[Pair]:
    """Pictures of the shards in a new order each time through them, each with one of its texts, without an end.

    DataError where a whole pass has none.
    """
    held: list[Held] = []

    def drawn() -> Pair:
        image, answer = held.pop(int(draw.integers(len(held))))
        return decode(image), answer

    while True:
        came = 0
        for number in draw.permutation(len(urls)):
            for sample in shards.read(urls[number]):
                if isinstance(sample, Sample) and (pair := _pair(sample, teaching, max_tokens, draw)) is not None:
                    came += 1
                    held.append(pair)
                    if len(held) >= SHUFFLED:
                        yield drawn()
        if not came:
            raise DataError(
                f"a captioner cannot be taught: none of the {len(urls)} shards (first {urls[0]}) has a picture that"
                f" can be read with a text of at most {max_tokens} tokens."
            )
        while held:
            yield drawn()


def make(folder: Path, shape: SmallVlmConfig, texts: Sequence[str], prompt: str) -> None:
    """Write a new model of a shape with random weights, and its processor, whose tokens are learned from the texts."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip import CLIPImageProcessorPil

    tokenizer = _tokenizer(shape, texts, prompt)
    side = {"height": shape.image_size, "width": shape.image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",  # all patches, without the token of the whole
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    tower = {"hidden_size": shape.width, "intermediate_size": 2 * shape.width, "num_attention_heads": shape.heads}
    vision = CLIPVisionConfig(
        **tower,
        num_hidden_layers=shape.vision_depth,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        projection_dim=shape.width,
    )
    text = LlamaConfig(
        **tower,
        num_hidden_layers=shape.text_depth,
        num_key_value_heads=shape.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=shape.positions,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(OWN_TOKENS[-1]),
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer(shape: SmallVlmConfig, texts: Sequence[str], prompt: str) -> Any:
    """A tokenizer of transformers whose tokens are learned from the texts and the prompt."""
    from tokenizers import ByteLevelBPETokenizer  # here, not above: it takes seconds, as transformers does
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    asked = [prompt] * max(1, len(texts) // 100)  # often enough to become few tokens
    bpe.train_from_iterator(
        [*texts, *asked], vocab_size=shape.vocabulary, special_tokens=[*OWN_TOKENS], show_progress=False
    )
    begin, padding, end, image = OWN_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=begin,
        pad_token=padding,
        eos_token=end,
        padding_side="left",
        extra_special_tokens={"image_token": image},
    )


def _learned(rows: Sequence[Inputs]) -> int:
    return sum(int((row[LABELS] != IGNORED).sum()) for row in rows)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )


def _copy_processor(start: Path, folder: Path) -> None:
    """Everything that says how a model reads and writes, as it is: saved again it might lack what it was opened
    without, such as its part for videos."""
    described = (path for ending in ("json", "jinja", "txt", "model") for path in start.glob(f"*.{ending}"))
    for path in described:
        if not (folder / path.name).exists() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


def _texts(urls: Sequence[str]) -> list[str]:
    return [
        str(caption["text"])
        for url in urls
        for sample in shards.read(url)
        if isinstance(sample, Sample)
        for caption in sample.captions
    ]


def _pair(sample: Sample, teaching: Teaching, max_tokens: int, draw: np.random.Generator) -> Held | None:
    """A picture and one of its texts; None where it cannot be read or has no text that can be learned."""
    texts = (str(each["text"]).strip() for each in sample.captions)
    answers = [answer for text in texts if (answer := teaching.answer(text, max_tokens))]
    if not answers:
        return None
    try:
        decode(sample.image)
    except ImageError:
        return None
    return sample.image, answers[int(draw.integers(len(answers)))]
