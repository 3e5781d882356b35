"""What every model family agrees on: what its architecture says of itself, what its models can do, what belongs to it.

A family is a folder and one `Family` in the table of `capfilt/models/registry.py`. The rooms above
know these classes alone: whoever wants to know what a model can do asks for its `capabilities`, never for its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from capfilt.errors import ModelError
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.layers.attention import Attention
from capfilt.models.layers.bert import Head, OutputLayer, TextTransformer
from capfilt.models.layers.config import Role
from capfilt.models.layers.image_context import DecoderCache, ImageContext

Names = dict[str, tuple[str, ...]]
"""Our name of a tensor -> every name that it has in a file."""


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
        "question_context",
    )  # fmt: skip
    """The methods, besides `forward`, through which a training enters a model."""
    vectors: ClassVar[tuple[str, ...]] = ()
    """Weights that are vectors in the family's own code and have more dimensions here: weight decay that spares vectors
    spares them. Any part of a model may have such a list, and one of `matrices`: vectors that decay all the same."""

    filled: frozenset[str] = frozenset()
    """The weights that came from checkpoints when the model was made to be trained; whoever fills it says so."""

    @property
    def fresh(self) -> frozenset[str]:
        """The weights that began at random beside others that did not."""
        return frozenset(name for name, _ in self.named_parameters() if self.filled) - self.filled

    @property
    def capabilities(self) -> frozenset[str]:
        return self.config.capabilities

    @property
    def vision_modules(self) -> list[nn.Module]:
        """What image tokens are made with: models whose vision modules are equal encode an image once for both."""
        return []

    @property
    def head_modules(self) -> list[nn.Module]:
        """The head of a model that is one on a base: `optimizer.head_rate` is of its weights."""
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

    def tokens_instead(self, tokens_BND: Tensor, queries: int) -> ImageContext | None:
        """What `decode_step` may attend to in place of an image context, at less work: for a decoder that has so many
        queries of an image in all, and shares no context with anybody. None: nothing."""
        return None

    def image_context_modules(self, role: Role) -> list[nn.Module] | None:
        """All that `image_context` depends on besides the tokens: models in which these are equal have equal ones.
        None: it is never the same as another model's."""
        return None

    @property
    def output_layer(self) -> OutputLayer | None:
        """What `decode_step` ends with, for whoever computes it otherwise and hands it in as `head`; None: nobody."""
        return None

    @property
    def decoder_stack(self) -> TextTransformer | None:
        """The stack that `decode_step` goes through, for whoever does it otherwise (`FusedDecoder`); None: nobody."""
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
        return image @ text_TP.T

    def fuse(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """Texts beside images -> states [B, T, D], for `match`; rows that share an image are adjacent."""
        self._cannot("fuse texts with images")

    def image_attention(self, layer: int) -> Attention:
        """What `fuse` attends to image tokens with in one of the architecture's `fusion_layers`."""
        self._cannot("say which patches of an image a text attends to")

    def fuse_cls(self, ids_BT: Tensor, lengths: Sequence[int], image: ImageContext, counts: Sequence[int]) -> Tensor:
        """`fuse` of texts of these lengths, `counts` texts of each image, adjacent; what `match` needs alone."""
        self._cannot("fuse texts with images")

    def summary(self, states_BTD: Tensor) -> Tensor:
        """Fused states -> the one vector of each text that heads of tasks read [B, D]."""
        return states_BTD[:, 0]

    def classify(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts beside the image tokens of their pictures -> logits of the classes [B, labels]."""
        self._cannot("classify")

    def question_context(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> ImageContext:
        """Questions beside the image tokens of their pictures -> what `decode` and `decode_step` of answers attend to:
        the states of the questions, as they were fused with the images."""
        self._cannot("answer questions")

    def match(self, states_BTD: Tensor) -> Tensor:
        """Fused states -> ITM logits [B, 2]; column 1 is "matches"."""
        self._cannot("match texts with images")

    def predict_box(self, states_BTD: Tensor) -> Tensor:
        """Fused states -> where in the image each text is: boxes [B, 4], center x, center y, width and height in shares
        of the picture."""
        self._cannot("say where in an image a text is")

    def unmask(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """Texts with hidden tokens beside images -> logits of the token at every position [B, T, V]."""
        self._cannot("guess hidden words")

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
    separate: ClassVar[Mapping[str, str]] = {}
    """The parts of a model that a file may lack as a whole, by the first word of our names, and what each is."""
    wrapper: ClassVar[str] = "model"
    """The key under which a written file has its tensors; "" where the file is the table of them."""
    suffix: ClassVar[str] = ".pth"
    """How the name of a written file ends."""

    @abstractmethod
    def lacks(self, tensors: Tensors) -> str:
        """What a file lacks to be one of these checkpoints; "" for nothing."""

    @abstractmethod
    def architecture(self, tensors: Tensors, described: Any, source: Path) -> ArchitectureConfig:
        """The architecture of a file, whose tensors are brought to one form in place; `described` is what a YAML beside
        it says, or None. ModelError for tensors of no possible model."""

    def describe(self, tensors: Tensors, sources: Mapping[str, str], source: Path) -> Any:
        """What stands for a YAML beside a file without one, by where the parts lie that it lacks; None for nothing."""
        return None

    @abstractmethod
    def names(self, config: Any) -> Names:
        """What the file calls the tensors of a model of ours."""

    def momentum(self, config: Any, tensors: Tensors, source: object) -> Tensors:
        """The momentum encoders by our names and the queues, [size, projection], that a file of a pretraining carries.
        ModelError where it carries none."""
        raise ModelError(f"{source} has no momentum copy: {self.name} is trained without one")

    @abstractmethod
    def write(self, config: Any, tensors: Tensors) -> Tensors:
        """Our tensors by the file's names, everything that its own code expects included."""

    def left_out(self, config: Any) -> dict[str, int]:
        """How many tensors of a model have no place in such a file, by the reason."""
        return {}


class FolderFormat(ABC):
    """How open_clip's folders hold models of a family: `open_clip_config.json` beside the weights."""

    @abstractmethod
    def architecture(self, described: Mapping[str, Any], tensors: Tensors, folder: Path) -> ArchitectureConfig:
        """What the JSON describes, and its tensors, if they are given, brought to one form in place. ModelError for
        what no model can be."""

    @abstractmethod
    def names(self, config: Any) -> Names:
        """What such a folder calls the tensors of a model of ours."""

    @abstractmethod
    def write(self, config: Any, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        """The `model_cfg` of a model and its tensors by open_clip's names. ModelError where it has no such model."""


InitialPart = Callable[[Any, str], set[str]]
"""Fills a part of a new model from a checkpoint, in place: (model, source) -> the names of the tensors it filled."""
