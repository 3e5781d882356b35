"""What every model family agrees on: what its architecture says of itself, what its models can do, what belongs to it.

A family is one `Family` (in the `__init__` of its folder) and one line in `capfilt/models/registry.py`. The rooms above
know these classes alone: whoever wants to know what a model can do asks for its `capabilities`, never for its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn

from capfilt.config import Config
from capfilt.data.images.preprocess import BLIP_PREPROCESS, Preprocess
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.layers.bert import Head, OutputLayer, Role
from capfilt.models.layers.block import Block
from capfilt.models.layers.image_context import DecoderCache, ImageContext

ModelRole = Literal["captioner", "filter"]
"""What a model does to web pairs: it writes a text for an image, or scores texts beside one."""
LanguageKind = Literal["opt", "t5"]
Names = dict[str, tuple[str, ...]]
"""Our name of a tensor -> every name that it has in a file."""


class ArchitectureConfig(Config, ABC):
    """The architecture of a model: what a YAML of `models/` says. Each family has a class of its own."""

    image_size_key: ClassVar[str] = "image_size"
    """The dotted key of the YAML that sets `image_size`."""

    family: str

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[str]:
        """What a model of this architecture can do, known before anything is built: encode_image, encode_text,
        fuse (score a text beside an image), decode (write a text), answer (a question)."""

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
    def feature_width(self) -> int:
        """Width of the vectors in which images and texts are compared; 0 where they are not."""
        return 0

    @property
    def towers(self) -> dict[str, dict[str, int]]:
        """The shape of each tower, by its name ("vision", "text"): what a saved model must have alike to begin from."""
        return {}

    @property
    def language_kind(self) -> LanguageKind | None:
        """The kind of the frozen language model, in whose tokens the texts are; None: WordPiece."""
        return None

    @property
    def first_token(self) -> int | None:
        """The id that a decoded text begins with; None: the one that the tokenizer begins texts with."""
        return None

    @property
    def frozen_vision(self) -> bool:
        """Whether the vision tower is frozen, so that its features of a picture can be kept."""
        return False

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

    def vocabulary_advice(self, entries: int) -> str:
        """What to set so that a tokenizer of `entries` fits."""
        return f"take a tokenizer of at most {self.vocabulary_size} entries"

    def check_language(self, source: str) -> None:
        """Refuse a language model other than the one described; ModelError."""


class FrozenTower(NamedTuple):
    """A vision tower that is not trained."""

    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    """Pictures [B, 3, S, S] -> features [B, N, D]; no gradients."""
    dtype: torch.dtype
    """The format in which features are kept."""
    described: tuple[object, ...]
    """What decides the features beside the weights, as JSON values."""


class Model(nn.Module):
    """A model of any family. A method that its architecture's `capabilities` do not name is not for it.

    Shape letters: B rows, T text positions, N image tokens, D width, P projection, V vocabulary, S side of a picture.
    """

    config: ArchitectureConfig
    entry_points: ClassVar[tuple[str, ...]] = (
        "encode_image", "image_context", "encode_text", "project_image", "project_text", "fuse", "match", "decode",
    )  # fmt: skip
    """The methods, besides `forward`, through which a training enters a model."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What this model can do."""
        return self.config.capabilities

    @property
    def vision_modules(self) -> list[nn.Module]:
        """What image tokens are made with: models whose vision modules are equal encode an image once for both."""
        return []

    @property
    def frozen_tower(self) -> FrozenTower | None:
        """The vision tower where it is frozen."""
        return None

    @property
    def shares_image_context(self) -> bool:
        """Whether encoder and decoder attend to an image through the same projections."""
        return False

    def recompute_vision(self, blocks: int) -> None:
        """Let the last so many vision blocks compute their activations again instead of keeping them."""

    def tied(self) -> dict[str, str]:
        """Second names of tensors that have two -> the first."""
        return {}

    def adapt(self, tensors: Tensors) -> None:
        """Bring a saved model's tensors to this one's shapes, in place: positions of another picture size."""

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """Pictures [B, 3, S, S], normalised floats -> image tokens [B, N, D]."""
        self._cannot("encode images")

    def image_context(self, tokens_BND: Tensor, role: Role, prompt: Sequence[int] = ()) -> ImageContext:
        """Image tokens -> what `fuse` (role "encoder") or `decode` and `decode_step` (role "decoder") attend to.

        `prompt` is for models that read one beside the image, before they write.
        """
        self._cannot("attend to images")

    def image_context_modules(self, role: Role) -> list[nn.Module] | None:
        """All that `image_context` depends on besides the tokens: models in which these are equal have equal ones.
        None: it is never the same as another model's."""
        return None

    @property
    def output_layer(self) -> OutputLayer | None:
        """What `decode_step` ends with, for whoever computes it otherwise and hands it in as `head`; None: nobody."""
        return None

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts -> states [B, T, D], without any image."""
        self._cannot("encode texts")

    def encode_cls(self, ids_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        """`encode_text` of texts of these lengths, the state of each one's first token alone [B, 1, D]."""
        self._cannot("encode texts")

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        """Image tokens -> unit vectors [B, P], or several of each image [B, Q, P]; fp32."""
        self._cannot("compare images with texts")

    def project_text(self, states_BTD: Tensor) -> Tensor:
        """Text states -> unit vectors [B, P], fp32."""
        self._cannot("compare images with texts")

    def similarity(self, image: Tensor, text_TP: Tensor) -> Tensor:
        """Vectors of images and of texts -> cosines [I, T]."""
        self._cannot("compare images with texts")

    def fuse(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """Texts beside images -> states [B, T, D], for `match`; rows that share an image are adjacent."""
        self._cannot("fuse texts with images")

    def fuse_cls(self, ids_BT: Tensor, lengths: Sequence[int], image: ImageContext, counts: Sequence[int]) -> Tensor:
        """`fuse` of texts of these lengths, `counts` texts of each image, adjacent; what `match` needs alone."""
        self._cannot("fuse texts with images")

    def match(self, states_BTD: Tensor) -> Tensor:
        """Fused states -> ITM logits [B, 2]; column 1 is "matches"."""
        self._cannot("match texts with images")

    def decode(self, ids_BT: Tensor, mask_BT: Tensor | None, image: ImageContext) -> Tensor:
        """Texts -> next-token logits [B, T, V], left to right."""
        self._cannot("decode")

    def cache(self, rows: int, length: int, image: ImageContext) -> DecoderCache:
        """Room for `rows` texts of at most `length` tokens, for `decode_step`."""
        self._cannot("decode")

    def decode_step(self, ids_BT: Tensor, image: ImageContext, cache: DecoderCache, head: Head | None = None) -> Tensor:
        """Feed the newest tokens [B, T] and return the logits after the last of them [B, V].

        `head` computes these from states [B, D] in place of the model's own.
        """
        self._cannot("decode")

    def _cannot(self, what: str) -> NoReturn:
        raise AssertionError(f"a model of the family {self.config.family} cannot {what}")


class TransformersFormat(ABC):
    """How a family's models lie in a folder of transformers."""

    classes: ClassVar[tuple[str, ...]]
    """The classes of transformers that are models of the family: `architectures` of their `config.json`."""
    telling: ClassVar[frozenset[str]] = frozenset()
    """The tensors that decide the architecture: they say what is tied."""
    processor: ClassVar[Mapping[str, Any]] = {}
    """Entries of `preprocessor_config.json` and `tokenizer_config.json` beside what every family writes."""
    special_tokens: ClassVar[Mapping[str, Any]] = {}
    """Entries of `tokenizer_config.json` for the tokens that a WordPiece vocabulary does not name."""

    @abstractmethod
    def architecture(self, described: Mapping[str, Any], tensors: Tensors, folder: Path) -> ArchitectureConfig:
        """What a `config.json` describes, and its tensors (or those of `telling`), which are brought to one form in
        place. ModelError for what no model can be."""

    @abstractmethod
    def names(self, config: Any) -> Names:
        """What transformers calls the tensors of a model of ours."""

    def absent(self, config: Any) -> Tensors:
        """Tensors of ours for which such a file has no place, with the values that they have then."""
        return {}

    @abstractmethod
    def write(self, config: Any, tensors: Tensors, special: Mapping[str, int]) -> tuple[dict[str, Any], Tensors]:
        """The `config.json` of a model and its tensors by transformers' names; `special` are the ids of "pad" and
        "sep". ModelError where transformers has no class for it."""

    def parts(self, config: Any) -> dict[str, dict[str, object]]:
        """The folders that a model is written into ("" is the folder itself), each with the fields of the architecture
        to change for it: transformers has no class for some of our models, but for their parts."""
        return {"": {}}

    def left_out(self, config: Any) -> dict[str, int]:
        """How many tensors of a model have no place in transformers, by the reason."""
        return {}

    @abstractmethod
    def usage(self, config: Any) -> str:
        """How to use a written folder: Python, FOLDER standing for its name and END for the id that ends a text."""


class OriginalFormat(ABC):
    """How a family's own code writes its checkpoints: a `.pth` of tensors that says nothing of the architecture."""

    name: ClassVar[str]
    """Whose code that is, for messages."""

    @abstractmethod
    def lacks(self, tensors: Tensors) -> str:
        """What a file lacks to be one of these checkpoints; "" for nothing."""

    @abstractmethod
    def architecture(self, tensors: Tensors, described: Any, source: Path) -> ArchitectureConfig:
        """The architecture of a file, whose tensors are brought to one form in place; `described` is what a YAML beside
        it says, or None. ModelError for tensors of no possible model."""

    @abstractmethod
    def names(self, config: Any) -> Names:
        """What the file calls the tensors of a model of ours."""

    @abstractmethod
    def momentum(self, config: Any, tensors: Tensors, source: object) -> Tensors:
        """The momentum encoders by our names and the queues, [size, projection], that a file of a pretraining carries.
        ModelError where it carries none."""

    @abstractmethod
    def write(self, config: Any, tensors: Tensors) -> Tensors:
        """Our tensors by the file's names, everything that its own code expects included."""


InitialPart = Callable[[Any, str], set[str]]
"""Fills a part of a new model from a checkpoint, in place: (model, source) -> the names of the tensors it filled."""


@dataclass(frozen=True)
class Family:
    """An architecture with everything that belongs to it. Its models are built by `build(config)`."""

    name: str
    config: type[ArchitectureConfig]
    build: Callable[[Any], Model]
    blocks: tuple[Block, ...] = ()
    continued: Callable[[Any, Any, Tensors, object], Model] | None = None
    """A model that goes on from a saved one: (its architecture, the saved one's, the saved tensors, their source).
    ModelError where more is missing than may start fresh. None: from one of the same shape alone."""
    preprocess: Preprocess = BLIP_PREPROCESS
    """How pictures are wanted where a model's folder does not say."""
    initial: Mapping[str, InitialPart] = field(default_factory=dict)
    """The parts of a new model ("vision", "text", "language") that can begin with weights of other checkpoints."""
    transformers: TransformersFormat | None = None
    original: OriginalFormat | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Keys of checkpoint files that are left behind on purpose (patterns), and why."""
