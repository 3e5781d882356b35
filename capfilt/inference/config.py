"""How texts are written and scored, and in which number format: configs, checked without torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from capfilt.config import Config, added
from capfilt.inference.captioners.endpoint.config import EndpointConfig, RequestConfig
from capfilt.inference.captioners.guard_rails import RULES, Rule
from capfilt.inference.captioners.prompts import IGNORE, check_templates

Format = Literal["fp32", "bf16"]
Precision = Literal["auto", "fp32", "bf16"]
DeviceKind = Literal["cpu", "cuda"]


class DecodeConfig(Config):
    """How a captioner writes. CapFilt: nucleus sampling with p = 0.9 (BLIP section 4.2)."""

    method: Literal["nucleus", "greedy", "beam"] = "nucleus"
    """Nucleus draws, and writes other texts for other seeds; greedy and beam search give each image its one answer.
    BLIP's figures for captioning are of beam search (section 5.2)."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus: draw from the smallest set of tokens whose probabilities reach this."""
    top_k: int = Field(default=0, ge=0)
    """Nucleus: at most so many tokens; 0 = no limit. (The public BLIP script has 50 here without saying so.)"""
    temperature: float = Field(default=1.0, gt=0)
    """Nucleus: logits are divided by it before the nucleus is taken; below 1 the likely tokens gain."""
    beams: int = Field(default=3, ge=1)
    """Beam search: how many texts of an image grow at a time; at most so many `captions` can be had."""
    length_penalty: float = 1.0
    """Beam search: a text's log-probability is divided by its length to this power; above 0, longer texts gain."""
    accounting: Literal["new_tokens", "original"] = added("new_tokens")
    """Beam search: what is a text's length. new_tokens: what is written, as transformers counts today; original: the
    prompt too, as the transformers of BLIP's code (4.15) counted, which also ended a search by another rule. BLIP's
    figures for captioning come from the latter, whose texts are often shorter; docs/parity.md."""
    repetition_penalty: float = Field(default=1.0, ge=1)
    """Divides the positive logits of tokens already there (the prompt's too), multiplies the negative ones; 1 = none.
    (The public BLIP script has 1.1 here when it draws.)"""
    min_length: int = Field(default=5, ge=1)
    """Tokens of prompt and text before the text may end."""
    max_length: int = Field(default=30, ge=3)
    """Tokens of prompt and text at most, with [DEC]."""
    prompt: str = ""
    """What the text begins with; not part of what is returned. Public captioners were fine-tuned with "a picture of
    "."""

    @model_validator(mode="after")
    def _lengths(self) -> DecodeConfig:
        if self.min_length >= self.max_length:
            raise ValueError(f"min_length {self.min_length} is not below max_length {self.max_length}")
        return self


class VlmConfig(Config):
    """How a vision-language model is asked, and what of its answer is the caption (docs/captioners.md). For captioners
    of `hf:` and `openai:`; how tokens are drawn stays with `decode`."""

    prompts: tuple[str, ...] = Field(default=(IGNORE,), min_length=1, max_length=100)
    """The names of the prompts that the captions of an image answer, in turn: `ignore` sees the image alone, `edit`
    corrects the web text, `fuse` describes the image with its help, or names of `templates`."""
    templates: dict[str, str] = {}
    """Prompts of your own by their names, or others in place of those that there are. `{alt}` is the first web text,
    `{NAME}` a field of the sample's json; a sample that lacks one is asked by `ignore`."""
    field_characters: int = Field(default=300, ge=1, le=20_000)
    """Characters of a field that a prompt takes; the rest is cut off at a space."""
    max_new_tokens: int = Field(default=64, ge=1, le=4096)
    """Tokens that an answer has at most."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; the first of them and what follows are cut off."""
    strip: tuple[str, ...] = ()
    """Texts that are taken from the beginning and the end of an answer, whatever their capitals ("Caption:")."""
    rules: tuple[Rule, ...] = RULES
    """The guard rails that an answer passes, in turn; what each cuts or drops is said in the row's reason."""
    copy_share: float = Field(default=0.8, gt=0, le=1)
    """From this share of its runs of three words on that the web text has too, a caption is marked as copied."""

    @model_validator(mode="after")
    def _prompts(self) -> VlmConfig:
        check_templates(self.prompts, self.templates)
        return self


class AnnotateConfig(Config):
    """How texts are written and scored. CapFilt: one nucleus sample per image (BLIP section 4.1)."""

    folder: ClassVar[str] = "annotate"

    captions: int = Field(default=1, ge=1, le=1000)
    """Synthetic texts per image; BLIP-2 takes 10."""
    decode: DecodeConfig = DecodeConfig()
    """How the captioner writes."""
    batch_size: int = Field(default=64, ge=1)
    """Images at a time. On a GPU, where it is not set, batches begin so and grow as long as that is faster and fits, to
    512. A run may go on with another number; docs/promises.md says what that changes."""
    max_length: int = Field(default=35, ge=4)
    """Tokens of a text that is scored; BLIP scores with 35."""
    precision: Precision = "auto"
    """auto: bf16 where all workers have GPUs that multiply it in hardware, fp32 on CPUs; chosen once for a run."""
    deterministic: bool = added(False)
    """GPUs: every batch has the same shapes, whatever is in it, so that a text and its scores are the same in any batch
    of this `batch_size`; it takes longer (docs/promises.md). Without effect on a CPU, where texts are so in fp32."""
    web_prefix: int = added(0, ge=0, le=256)
    """BLIP and X-VLM: so many tokens of its web text stand before what an image's texts begin with, and the text goes
    on from there; 0 = none. For vision-language models `vlm.prompts` says it."""
    capture: bool = added(False)
    """BLIP and X-VLM on a GPU: the captioner's steps are captured as CUDA graphs, so that the host starts hundreds of
    kernels at once, for memory that holds a second copy of what a batch's images are to the decoder. It has not run on
    a GPU yet: see with `capfilt bench annotate` what it gives. A run may go on with the other; on a CPU it is without
    effect."""
    vlm: VlmConfig = added(VlmConfig())
    """How a vision-language model writes."""
    endpoint: EndpointConfig = added(EndpointConfig())
    """What is sent to a captioner that is an endpoint."""
    requests: RequestConfig = added(RequestConfig())
    """How such a captioner is asked: how many requests at a time, how long, how often. A run may go on with others."""

    @model_validator(mode="after")
    def _enough(self) -> AnnotateConfig:
        if self.decode.method == "beam" and self.captions > self.decode.beams:
            raise ValueError(
                f"captions {self.captions} of {self.decode.beams} beams: decode.beams must be at least as many"
            )
        if self.deterministic and self.web_prefix:
            raise ValueError(
                "deterministic and web_prefix do not go together: what stands before a text has its length"
            )
        return self


EXECUTION_FIELDS = dict.fromkeys(("batch_size", "precision", "deterministic", "capture", "requests"), True)
"""What AnnotateConfig says of how texts are computed and not of which: no part of plan and fingerprint. In their place
stands the format that was chosen, in `AnnotateJob.compute`. As what pydantic leaves out."""
