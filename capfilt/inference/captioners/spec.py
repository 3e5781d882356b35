"""What a captioner is, as jobs and recipes name it: a model of one of our families, or another kind after a prefix.

A spec is checked, fingerprinted and sent to workers without torch; it imports what computes where it is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from capfilt.config import Config
from capfilt.errors import RecipeError
from capfilt.inference.captioners.endpoint.spec import EndpointSpec
from capfilt.inference.captioners.vlm.spec import VlmSpec
from capfilt.inference.config import AnnotateConfig, VlmConfig
from capfilt.inference.roles import check_captioner
from capfilt.models import Architecture
from capfilt.models.checkpoints import store
from capfilt.runs.run import Run
from capfilt.storage.paths import StoragePath

if TYPE_CHECKING:
    import torch

    from capfilt.inference.interface import Captioner


class LocalSpec(Config):
    """A model of one of our families that can decode, in the worker's own process."""

    kind: Literal["local"] = "local"
    model: StoragePath
    """A folder or file, as `store.find` answers."""

    def check(self, config: AnnotateConfig) -> None:
        """Refuse a model that cannot caption, and settings that do not fit it. RecipeError, ModelError or TextError."""
        if config.vlm != VlmConfig():
            raise RecipeError(
                f"the keys of `vlm` have no effect on {self.model}; they are for captioners of hf: and openai:"
            )
        architecture = check_captioner(self.model, config.decode)
        if config.web_prefix:
            check_web_prefix(self.model, architecture, config)

    def fingerprint(self) -> str:
        """Which model writes, by its weights and not by where it lies."""
        return store.fingerprint(self.model)

    def identity(self, run: Run, config: AnnotateConfig, say: Callable[[str], None]) -> str:
        """What tells this model from another beyond its fingerprint; "" for nothing."""
        return ""

    def names_prompts(self, config: AnnotateConfig) -> bool:
        """Whether the captions say which prompt they answer, and annotations have the column `prompt`."""
        return config.web_prefix > 0

    def open(
        self,
        config: AnnotateConfig,
        seed: int,
        round_: int,
        device: torch.device,
        dtype: torch.dtype,
        cache: StoragePath,
    ) -> Captioner:
        """The captioner on a device of this process. `cache`: a folder of the run, for what must not be asked twice."""
        from capfilt.inference.captioners.local import LocalCaptioner
        from capfilt.inference.local_model import LocalModel

        model = LocalModel.load(self.model, device, dtype)
        return LocalCaptioner(model, config.decode, config.captions, seed, round_, config.web_prefix, config.capture)


def check_web_prefix(model: StoragePath, architecture: Architecture, config: AnnotateConfig) -> None:
    """Refuse web texts before the prompt of a model that reads its prompt elsewhere, or has no room for them.
    RecipeError."""
    if architecture.language_kind is not None:
        raise RecipeError(f"web_prefix is for BLIP and X-VLM, whose text goes on from it; {model} has a language model")
    if config.web_prefix + config.decode.max_length > architecture.max_positions:
        raise RecipeError(
            f"web_prefix {config.web_prefix} and decode.max_length {config.decode.max_length} are more than the"
            f" {architecture.max_positions} positions of {model}; lower one of them"
        )


CaptionerSpec = LocalSpec | VlmSpec | EndpointSpec


def captioner_spec(name: str) -> CaptionerSpec:
    """What a captioner's name means: a model of one of our families, or another kind after its prefix.

    Raises:
        RecipeError: an address that is none.
        NoModelError, ModelError: as `store.find`.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix == "openai":
        return EndpointSpec.of(rest)
    if colon and prefix == "hf":
        return VlmSpec.of(rest)
    return LocalSpec(model=store.find(name))
