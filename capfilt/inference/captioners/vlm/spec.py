"""A vision-language model of transformers as jobs and recipes name it: `hf:FOLDER-OR-NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from capfilt.config import Config
from capfilt.errors import RecipeError
from capfilt.inference.captioners.vlm import folder
from capfilt.inference.config import AnnotateConfig, DecodeConfig
from capfilt.runs.run import Run
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath

if TYPE_CHECKING:
    import torch

    from capfilt.inference.interface import Captioner

_DRAWS = ("method", "top_p", "top_k", "temperature", "repetition_penalty")
"""The fields of `decode` that hold for a vision-language model too."""


class PromptedSpec(Config):
    """A captioner that answers prompts: a vision-language model, in this process or behind an endpoint."""

    def check(self, config: AnnotateConfig) -> None:
        """Refuse settings that do not fit one, and a model or an environment that does not. RecipeError, ModelError."""
        check_decode(config.decode)
        if config.deterministic:
            raise RecipeError("deterministic is for captioners of capfilt's own families, whose shapes it fixes")
        if config.web_prefix:
            raise RecipeError("web_prefix is for BLIP and X-VLM; this captioner sees the web text by vlm.prompts")

    def names_prompts(self, config: AnnotateConfig) -> bool:
        """Whether the captions say which prompt they answer: they do."""
        return True


class VlmSpec(PromptedSpec):
    """A vision-language model of transformers, in the worker's own process."""

    kind: Literal["vlm"] = "vlm"
    model: StoragePath
    """A folder, as `folder.find` answers."""

    @classmethod
    def of(cls, name: str) -> VlmSpec:
        """The model of a folder or a name on the hub. NoModelError or ModelError as `folder.find`."""
        return cls(model=folder.find(name))

    def check(self, config: AnnotateConfig) -> None:
        super().check(config)
        folder.check(self.model)

    def fingerprint(self) -> str:
        """Which model writes, by its weights and all that is described beside them."""
        return folder.fingerprint(self.model)

    def identity(self, run: Run, config: AnnotateConfig, say: Callable[[str], None]) -> str:
        return ""

    def open(
        self,
        config: AnnotateConfig,
        seed: int,
        round_: int,
        device: torch.device,
        dtype: torch.dtype,
        cache: StoragePath,
    ) -> Captioner:
        """The captioner on a device of this process."""
        from capfilt.inference.captioners.vlm.captioner import VlmCaptioner

        return VlmCaptioner.load(local_copy(self.model), config, seed, round_, device, dtype)


def check_decode(decode: DecodeConfig) -> None:
    """Refuse what has no effect on a vision-language model. RecipeError."""
    if decode.method == "beam":
        raise RecipeError("decode.method is beam: a vision-language model writes by nucleus or greedy; set one of them")
    for name, field in DecodeConfig.model_fields.items():
        if name not in _DRAWS and getattr(decode, name) != field.default:
            instead = {"max_length": "vlm.max_new_tokens", "prompt": "vlm.prompts and vlm.templates"}.get(name)
            raise RecipeError(
                f"decode.{name} has no effect on a vision-language model: "
                + (f"set {instead}" if instead else f"leave it out; {', '.join(_DRAWS)} have")
            )
