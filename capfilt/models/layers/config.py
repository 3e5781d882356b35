"""The configs of the towers that several families are made of, without torch: a ViT, and stacks made like BERT."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from capfilt.config import Config, added
from capfilt.models.layers.limits import (
    Depth,
    Deviation,
    Entries,
    Epsilon,
    Heads,
    Hidden,
    Positions,
    Rate,
    Side,
    Width,
    refuse_too_many,
)

Activation = Literal["gelu", "quick_gelu"]
"""Of feed-forward layers: the exact GELU, or OpenAI's x * sigmoid(1.702 x). Weights of one are of no use in the other,
and no file of tensors says which it is."""
Role = Literal["encoder", "decoder"]
Share = Literal["all", "all_but_cross_attention", "all_but_self_attention", "none"]

MAX_TOKENS = 256**2 + 1
"""Of a picture: 4096 px in patches of 16. The public models have up to 1,025."""

APART: dict[Share, frozenset[str]] = {
    "all": frozenset(),
    "all_but_cross_attention": frozenset({"cross_attention"}),
    "all_but_self_attention": frozenset({"self_attention"}),
    "none": frozenset({"embeddings", "self_attention", "cross_attention", "feed_forward"}),
}
"""For each way of sharing, the parts that each role has for itself (BLIP, Table 3)."""


class VisionConfig(Config):
    """A ViT. BLIP section 3.1: B/16 is 768 x 12 x 12, L/16 is 1024 x 24 x 16. BLIP-2: EVA's g/14 without the last of
    its 40 blocks, 1408 x 39 x 16, hidden 6144."""

    image_size: Side
    """Side of the square picture, pixels."""
    patch_size: Side
    """Side of a square patch, pixels; a divisor of `image_size`."""
    width: Width
    """Width of the image tokens; a multiple of `heads`."""
    depth: Depth
    """Blocks."""
    heads: Heads
    """Attention heads of each block."""
    hidden: Hidden
    """Inner width of the feed-forward layers; 4 x width in the public models."""
    drop_path: Rate = 0.0
    """Stochastic depth at the last block; grows linearly from 0."""
    layer_norm_eps: Epsilon = 1e-6
    """What a LayerNorm adds to the variance; transformers' BLIP has 1e-5 by default."""
    key_bias: bool = True
    """Whether keys have a bias; those of EVA's ViT-g have none."""
    final_norm: bool = True
    """Without it the tokens come as the last block leaves them; BLIP-2 has a norm of its own behind."""
    init_std: Deviation = 0.02
    """Standard deviation of fresh weights. The public 0.02 suits widths near 768; narrow models learn faster from
    1 / sqrt(width)."""
    activation: Activation = added("gelu")
    """Of the feed-forward layers."""
    patch_bias: bool = added(True)
    """Whether patches are embedded with a bias; in CLIP they are not."""
    pre_norm: bool = added(False)
    """A LayerNorm between the embeddings and the first block, as CLIP has it."""

    @model_validator(mode="after")
    def _divisible(self) -> VisionConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of heads {self.heads}")
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(
                f"a picture of {self.image_size} px would be {self.num_tokens} tokens in patches of {self.patch_size}; "
                f"allowed are {MAX_TOKENS}"
            )
        refuse_too_many("vision", self.weights)
        return self

    @property
    def weights(self) -> int:
        """About how many numbers it learns; norms and biases are not counted."""
        block = 4 * self.width**2 + 2 * self.width * self.hidden
        return self.depth * block + (self.num_tokens + 3 * self.patch_size**2) * self.width

    @property
    def num_tokens(self) -> int:
        """Patches plus [CLS]."""
        return (self.image_size // self.patch_size) ** 2 + 1


class SwinConfig(Config):
    """A Swin transformer (arXiv 2103.14030): Swin-B begins 128 wide, of depths 2, 2, 18, 2 and heads 4, 8, 16, 32.

    Every stage but the last ends with tokens joined by four and twice as wide. A window is as wide as the last stage's
    grid: 7 tokens at 224 px, 12 at 384, as in the released models.
    """

    image_size: Side
    """Side of the square picture, pixels; a multiple of `stride`."""
    patch_size: Side = 4
    """Side of a square patch, pixels."""
    embed: Width
    """Width of the first stage's tokens."""
    depths: tuple[Depth, ...] = Field(min_length=1, max_length=8)
    """Blocks of each stage."""
    stage_heads: tuple[Heads, ...]
    """Attention heads of a block in each stage."""
    drop_path: Rate = 0.1
    """Stochastic depth at the last block; grows linearly from 0."""
    layer_norm_eps: Epsilon = 1e-5
    """What a LayerNorm adds to the variance."""
    init_std: Deviation = 0.02
    """Standard deviation of fresh weights; see VisionConfig."""

    @model_validator(mode="after")
    def _divisible(self) -> SwinConfig:
        if len(self.stage_heads) != len(self.depths):
            raise ValueError(f"stage_heads has {len(self.stage_heads)} stages and depths {len(self.depths)}")
        for stage, heads in enumerate(self.stage_heads):
            if (width := self.embed << stage) % heads:
                raise ValueError(f"stage {stage} is {width} wide, not a multiple of its {heads} heads")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.stride}, the side of the patch that a token "
                "of the last stage stands for"
            )
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(
                f"a picture of {self.image_size} px would be {self.num_tokens} tokens; allowed are {MAX_TOKENS}"
            )
        refuse_too_many("vision", self.weights)
        return self

    @property
    def stride(self) -> int:
        """Side of what a token of the last stage stands for, pixels."""
        return self.patch_size << (len(self.depths) - 1)

    @property
    def window(self) -> int:
        """Tokens at the side of a window, and of the last stage's grid."""
        return self.image_size // self.stride

    @property
    def width(self) -> int:
        return self.embed << (len(self.depths) - 1)

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def num_tokens(self) -> int:
        """Tokens of the last stage plus [CLS], which is their mean."""
        return self.window**2 + 1

    @property
    def weights(self) -> int:
        """About how many numbers it learns; norms and biases are not counted."""
        blocks = sum(12 * depth * (self.embed << stage) ** 2 for stage, depth in enumerate(self.depths))
        joins = sum(8 * (self.embed << stage) ** 2 for stage in range(len(self.depths) - 1))
        return blocks + joins + 3 * self.patch_size**2 * self.embed


class TextStackConfig(Config):
    """The shape of a stack that reads texts."""

    vocab_size: Entries
    """Entries of the vocabulary, the family's own marks included: BERT's 30522 and two for BLIP, one for BLIP-2."""
    width: Width
    """Width of the text states; a multiple of `heads`."""
    depth: Depth
    """Layers."""
    heads: Heads
    """Attention heads of each layer."""
    hidden: Hidden
    """Inner width of the feed-forward layers; 4 x width in the public models."""
    max_positions: Positions = 512
    """Tokens of a text at most."""

    @model_validator(mode="after")
    def _divisible(self) -> TextStackConfig:
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of heads {self.heads}")
        refuse_too_many("text", self.weights)
        return self

    @property
    def weights(self) -> int:
        """About how many numbers it learns; norms and biases are not counted."""
        layer = 4 * self.width**2 + 2 * self.width * self.hidden
        return self.depth * layer + (self.vocab_size + self.max_positions) * self.width


class BertConfig(TextStackConfig):
    """What every stack that is made like BERT says of itself. BERT-base is 768 x 12 x 12."""

    dropout: Rate = 0.1
    """Dropout of embeddings, attention and outputs in training."""
    layer_norm_eps: Epsilon = 1e-12
    """What a LayerNorm adds to the variance."""
    init_std: Deviation = 0.02
    """Standard deviation of fresh weights; see VisionConfig."""
    roles: tuple[Role, ...] = ("encoder", "decoder")
    """A pretrained model has both; a captioner needs only the decoder, a filter only the encoder."""
    tie_lm_head: bool = True
    """Whether the output matrix is the word embeddings."""

    @property
    def weights(self) -> int:
        layer = 8 * self.width**2 + 2 * self.width * self.hidden
        return self.depth * layer + (self.vocab_size + self.max_positions) * self.width


class TextConfig(BertConfig):
    """BERT with cross-attention in every layer (BLIP section 3.1). Of `vocab_size` entries the last two are [DEC] and
    [ENC]: 30522 and 30523 after BERT's vocabulary."""

    fusion_layer: ClassVar[int] = 0
    token_types: ClassVar[int] = 0

    share: Share = "all_but_self_attention"
    """What encoder and decoder have in common (BLIP, Table 3)."""

    @property
    def dec(self) -> int:
        """Id of [DEC], which stands in place of [CLS] when the stack writes."""
        return self.vocab_size - 2

    @property
    def enc(self) -> int:
        """Id of [ENC], which stands in place of [CLS] when the stack matches a pair."""
        return self.vocab_size - 1


class FusionTextConfig(BertConfig):
    """BERT whose upper layers attend to an image: the lower ones are the text encoder, the upper ones the fusion
    encoder (ALBEF section 3.1; X-VLM section 3.1). Read from left to right, all of them are a decoder."""

    share: ClassVar[Share] = "all"

    fusion_layer: Depth
    """How many layers read the text alone; 6 of the 12 of BERT-base."""
    token_types: Literal[0, 2] = 2
    """Entries of BERT's embedding of token types, of which the first is added to every word."""

    @model_validator(mode="after")
    def _fuses(self) -> FusionTextConfig:
        if self.fusion_layer >= self.depth:
            raise ValueError(f"fusion_layer {self.fusion_layer} leaves none of {self.depth} layers to attend to images")
        return self

    @property
    def weights(self) -> int:
        return super().weights - 4 * self.fusion_layer * self.width**2


class DecoderConfig(BertConfig):
    """BERT read from left to right, which attends in every layer to the states of another text: the decoder of answers
    of ALBEF and X-VLM."""

    fusion_layer: ClassVar[int] = 0
    share: ClassVar[Share] = "all"

    roles: tuple[Role, ...] = ("decoder",)
    token_types: Literal[0, 2] = 2
    """As of a FusionTextConfig."""


class EmbeddingsConfig(Config):
    """BERT's embeddings and its head without any layer between, for models whose blocks read texts and patches
    together (ViLT, VLMo). BERT-base's are 768 wide."""

    token_types: ClassVar[int] = 2

    vocab_size: Entries
    """Entries of the vocabulary; BERT's 30522."""
    width: Width
    """Width of the blocks."""
    max_positions: Positions = 40
    """Tokens of a text at most."""
    dropout: Rate = 0.1
    """Dropout of the embeddings in training."""
    layer_norm_eps: Epsilon = 1e-12
    """What the LayerNorms of embeddings and head add to the variance; those of the blocks have one of their own."""
    init_std: Deviation = 0.02
    """Standard deviation of fresh weights; see VisionConfig."""
    tie_lm_head: bool = False
    """Whether the head's output matrix is the word embeddings."""

    @property
    def weights(self) -> int:
        """About how many numbers it learns; norms and biases are not counted."""
        head = 0 if self.tie_lm_head else self.vocab_size
        return (self.vocab_size + self.max_positions + self.width + head) * self.width
