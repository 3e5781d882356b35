"""What the architecture of any model says of itself: the part of a family that recipes and checks need, without torch.

The classes here and in `config.py` of each family are read before torch is imported, so that a mistake in a recipe is
shown within a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from capfilt import presets
from capfilt.config import Config

if TYPE_CHECKING:
    import torch

    from capfilt.data.images.preprocess import Preprocess
    from capfilt.data.text.language_tokenizer import TokenizerKind

ModelRole = Literal["captioner", "filter"]
"""What a model does to web pairs: it writes a text for an image, or scores texts beside one."""
LanguageKind = Literal["opt", "t5"]


def alias(path: str) -> Any:
    """A property that is what lies at a dotted path of its object."""
    return property(attrgetter(path))


class ArchitectureConfig(Config, ABC):
    """The architecture of a model: what a YAML of `models/` says. Each family has a class of its own."""

    shelf: ClassVar[presets.Shelf] = "models"
    extends_levels: ClassVar[int] = 2  # a YAML may extend a preset that extends one
    image_size_key: ClassVar[str] = "image_size"
    """The dotted key of the YAML that sets `image_size`."""
    rank_smoothing: ClassVar[float] = 0.0
    """The label smoothing by which a decoder's answers are ranked."""
    ranks_first_twice: ClassVar[bool] = False
    """Whether the first token of an answer counts twice where a decoder's answers are ranked."""
    frozen_vision: ClassVar[bool] = False
    """Whether the vision tower is frozen, so that its features of a picture can be kept."""

    family: str
    """The family, which decides the other keys."""

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[str]:
        """What a model of this architecture can do, known before anything is built: encode_image, encode_text,
        fuse (score a text beside an image), decode (write a text), answer (a question), unmask (guess hidden words),
        ground (say where in an image a text is), classify (a text beside an image)."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square picture, pixels."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """How many entries a tokenizer may have, special tokens included."""

    @property
    def max_positions(self) -> int:
        """Tokens of a text at most."""
        return 512

    @property
    def scored_length(self) -> int:
        """Tokens of a text that is scored, where nobody says otherwise; BLIP evaluates with 35."""
        return 35

    @property
    @abstractmethod
    def num_weights(self) -> int:
        """About how many numbers a model learns; norms and biases are not counted."""

    @property
    def num_layers(self) -> int:
        """Layers of all towers, of which a file of weights has a tensor each at least."""
        return 0

    @property
    def vision_depth(self) -> int:
        """Blocks of the vision tower whose activations can be recomputed."""
        return 0

    @property
    def image_grid(self) -> int:
        """Image tokens at the side of a picture, of which parts can be looked at by themselves; 0: they cannot."""
        return 0

    @property
    def fusion_layers(self) -> range:
        """The layers of `fuse` in which a text attends to a grid of image tokens; none: no heatmap can be drawn."""
        return range(0)

    @property
    def heatmap_layer(self) -> int:
        """The one of them whose attention says best where in an image a text is: the middle one, and never the last of
        several, behind which the words have no say in ITM. ALBEF and X-VLM name 8 and 9 of their 12."""
        layers = self.fusion_layers
        return layers[min(len(layers) // 2, max(len(layers) - 2, 0))]

    @property
    def feature_width(self) -> int:
        """Width of the vectors in which images and texts are compared; 0 where they are not."""
        return 0

    @property
    def towers(self) -> dict[str, dict[str, int | str]]:
        """The shape of each tower, by its name ("vision", "text"): what a saved model must have alike to begin from."""
        return {}

    @property
    def language_kind(self) -> LanguageKind | None:
        """The kind of the frozen language model, in whose tokens the texts are; None: there is none."""
        return None

    @property
    def tokenizer_kind(self) -> TokenizerKind:
        """How its texts are cut into tokens."""
        return self.language_kind or "wordpiece"

    @property
    def pictures_of_text(self) -> int:
        """Pictures beside a text that is classified: 2 in NLVR2."""
        return 1

    @property
    def known_answers(self) -> tuple[str, ...] | None:
        """Of a model that answers questions the answers that it chooses among; none where they are not known yet. None:
        it answers no questions, or has classes of another task."""
        return None

    def with_answers(self, answers: tuple[str, ...]) -> Self:
        """The same with answers to choose among."""
        raise AssertionError(f"a model of the family {self.family} chooses among no answers")

    @property
    def fused_width(self) -> int:
        """Width of the states of texts that are fused with images; 0 where none are."""
        return 0

    @property
    def fused_init_std(self) -> float | None:
        """Standard deviation of the fresh weights of a head on them; None: as torch begins a layer."""
        return 0.02

    @property
    def starts_from(self) -> ArchitectureConfig | None:
        """What a training may start from beside a model of this architecture; None: nothing."""
        return None

    @property
    def first_token(self) -> int | None:
        """The id that a decoded text begins with; None: the one that the tokenizer begins texts with."""
        return None

    def pictures(self, usual: Preprocess) -> Preprocess:
        """How pictures are wanted where a model's folder does not say; `usual` is the family's way."""
        return usual

    def changed(self, **changes: object) -> Self:
        """The same with some fields set otherwise, its own and those of its parts: roles, image_size, dropout, ..."""
        known: dict[str, object] = {}
        update: dict[str, object] = {}
        for name in type(self).model_fields:
            part = getattr(self, name)
            if isinstance(part, Config):
                mine = {key: value for key, value in changes.items() if key in type(part).model_fields}
                update[name] = part.model_copy(update=mine) if mine else part
                known |= mine
            elif name in changes:
                update[name] = known[name] = changes[name]
        assert not changes.keys() - known.keys(), f"no such part of an architecture: {changes.keys() - known.keys()}"
        return self.model_copy(update=update)

    def for_role(self, role: ModelRole) -> Self:
        """The same with the parts alone that a role needs."""
        return self

    def computing_in(self, dtype: torch.dtype | None) -> Self:
        """The same for a model that is to compute in this format, of which frozen parts may be held in it."""
        return self

    def vocabulary_setting(self, entries: int) -> str:
        """The assignment that makes room for a tokenizer of `entries`, such as "text.vocab_size=30524"; "" where the
        vocabulary is a language model's."""
        return ""

    def check_language(self, source: str) -> None:
        """Refuse a language model other than the one described; ModelError."""
