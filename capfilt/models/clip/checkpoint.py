"""CLIP's checkpoints: transformers' `CLIPModel`, open_clip's folders, and files by OpenAI's names.

The last are OpenAI's TorchScript archives, state dicts, and what open_clip's trainer saves. A state dict does not say
which activation it is of: a YAML beside it must, and nothing can check it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from capfilt.errors import ModelError
from capfilt.models.checkpoints import files, key_maps, open_clip, torchscript
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.key_maps import Table
from capfilt.models.checkpoints.transformers_folder import STACK, possible
from capfilt.models.clip.config import ClipConfig
from capfilt.models.clip.model import Clip
from capfilt.models.family import FamilyCode
from capfilt.models.interface import FolderFormat, Names, OriginalFormat, TransformersFormat
from capfilt.models.layers.config import Activation
from capfilt.models.layers.vit import VISION_BLOCK

Layout = Literal["openai", "hf"]
Pairs = dict[str, tuple[str, str]]

REST: Pairs = {
    "vision.cls": ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    "vision.positions": ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    "vision.patches.weight": ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    "vision.pre_norm.*": ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),
    "vision.norm.*": ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    "image_projection.weight": ("visual.proj", "visual_projection.weight"),
    "text.words.weight": ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    "text.positions": ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    "text.norm.*": ("ln_final.*", "text_model.final_layer_norm.*"),
    "text_projection.weight": ("text_projection", "text_projection.weight"),
    "logit_scale": ("logit_scale", "logit_scale"),
}
"""Our names -> OpenAI's, which are open_clip's, and transformers', whose typing error is real."""
TOWERS: Pairs = {
    "vision.": ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    "text.": ("transformer.resblocks.", "text_model.encoder.layers."),
}
BLOCK: Pairs = {
    "blocks.{n}.attention_norm.*": ("{n}.ln_1.*", "{n}.layer_norm1.*"),
    "blocks.{n}.attention.qkv.weight": ("{n}.attn.in_proj_weight", "{n}.self_attn.in_proj_weight"),
    "blocks.{n}.attention.qkv.bias": ("{n}.attn.in_proj_bias", "{n}.self_attn.in_proj_bias"),
    "blocks.{n}.attention.out.*": ("{n}.attn.out_proj.*", "{n}.self_attn.out_proj.*"),
    "blocks.{n}.feed_forward_norm.*": ("{n}.ln_2.*", "{n}.layer_norm2.*"),
    "blocks.{n}.feed_forward.up.*": ("{n}.mlp.c_fc.*", "{n}.mlp.fc1.*"),
    "blocks.{n}.feed_forward.down.*": ("{n}.mlp.c_proj.*", "{n}.mlp.fc2.*"),
}
"""transformers' three projections are joined before (`take_up`) and split again behind (`give`)."""
IGNORED = {
    r".*embeddings\.position_ids": "a constant, 0, 1, 2, ...",
    r"input_resolution|context_length|vocab_size": "sizes, which the tensors say too",
    r"(transformer\.)?attn_mask": "the causal mask, a constant",
}
"""Keys that are left behind on purpose, and why."""

FIELDS: dict[str, Table] = {
    "vision": STACK | {"image_size": "image_size", "patch_size": "patch_size"},
    "text": STACK | {"vocab_size": "vocab_size", "max_positions": "max_position_embeddings"},
}
"""Fields of our towers -> what transformers' `config.json` calls them."""
VIT_B_32: dict[str, dict[str, Any]] = {
    "vision": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072, "image_size": 224, "patch_size": 32},
    "text": {"width": 512, "depth": 12, "heads": 8, "hidden": 2048, "vocab_size": 49408, "max_positions": 77},
}
"""What is meant where transformers' file says nothing."""


def names(config: ClipConfig, layout: Layout) -> Names:
    """What a file of that layout calls the tensors of a model of ours."""
    side = 1 if layout == "hf" else 0
    lines = [*key_maps.expand({ours: theirs[side] for ours, theirs in REST.items()}, 1, "", "")]
    block = {ours: theirs[side] for ours, theirs in BLOCK.items()}
    for (ours, theirs), depth in zip(TOWERS.items(), (config.vision.depth, config.text.depth), strict=True):
        lines += key_maps.expand(block, depth, ours, theirs[side])
    return key_maps.once(lines)


def take_up(tensors: Tensors, layout: Layout) -> None:
    """Bring a file's tensors to our shapes, under the file's names and in fp32, in place."""
    key_maps.join_projections(tensors, ".self_attn.{}_proj.", "qkv", ".self_attn.in_proj_")
    for ours, theirs in REST.items():
        name = theirs[1 if layout == "hf" else 0]
        if name in tensors and (ours == "vision.cls" or ours.endswith(".positions")):
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
        elif name in tensors and "_projection" in ours and layout == "openai":
            tensors[name] = tensors[name].T.contiguous()
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}


def give(tensors: Tensors, config: ClipConfig, layout: Layout) -> Tensors:
    """Our tensors by a file's names, in its shapes."""
    given: Tensors = {}
    for ours, (theirs,) in names(config, layout).items():
        tensor = tensors[ours]
        if ours == "vision.cls" or ours.endswith(".positions"):
            tensor = tensor[0, 0] if ours == "vision.cls" else tensor[0]
        elif "_projection" in ours and layout == "openai":
            tensor = tensor.T
        if ".self_attn.in_proj_" in theirs:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                given[theirs.replace("in_proj_", f"{part}_proj.")] = third.contiguous()
        else:
            given[theirs] = tensor.contiguous()
    return given


class ClipTransformers(TransformersFormat):
    """transformers' `CLIPModel`."""

    classes = ("CLIPModel",)
    processor = {"processor_class": "CLIPProcessor"}

    def architecture(self, described: Mapping[str, Any], tensors: Tensors, folder: Path) -> ClipConfig:
        """What a `config.json` describes; what it leaves out is that of ViT-B/32, with quick_gelu."""
        take_up(tensors, "hf")
        said = {tower: described.get(f"{tower}_config") or {} for tower in FIELDS}
        used = sorted({str(part.get("hidden_act", "quick_gelu")) for part in said.values()})
        if used not in (["gelu"], ["quick_gelu"]):
            raise ModelError(f"{folder}: hidden_act is {' and '.join(used)}; gelu or quick_gelu, in both towers alike")
        towers = {
            tower: {ours: said[tower].get(theirs, VIT_B_32[tower].get(ours, 1e-5)) for ours, theirs in table.items()}
            for tower, table in FIELDS.items()
        }
        with possible(folder):
            temperature = math.exp(-described.get("logit_scale_init_value", 2.6592))
            projection = described.get("projection_dim", 512)
            return ClipConfig(activation=used[0], projection=projection, temperature=temperature, **towers)

    def names(self, config: ClipConfig) -> Names:
        return names(config, "hf")

    def write(self, config: ClipConfig, tensors: Tensors, special: Mapping[str, int]) -> tuple[dict[str, Any], Tensors]:
        end = special["sep"]
        common = {"hidden_act": config.activation, "projection_dim": config.projection}
        parts = {
            f"{tower}_config": {theirs: getattr(getattr(config, tower), ours) for ours, theirs in table.items()}
            | {"model_type": f"clip_{tower}_model", **common}
            for tower, table in FIELDS.items()
        }
        parts["text_config"] |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        described = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "dtype": "float32",
            "projection_dim": config.projection,
            "logit_scale_init_value": -math.log(config.temperature),
            **parts,
        }
        return described, give(tensors, config, "hf")

    def usage(self, config: ClipConfig) -> str:
        return """
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(FOLDER), CLIPProcessor.from_pretrained(FOLDER)
    inputs = processor(text=["a photo of a cat"], images=image, return_tensors="pt", padding=True)
    model(**inputs).logits_per_image
"""


class OpenClipFolder(FolderFormat):
    """open_clip's folder, as `hf-hub:` and `local-dir:` name it."""

    def architecture(self, described: Mapping[str, Any], tensors: Tensors, folder: Path) -> ClipConfig:
        """What an `open_clip_config.json` describes: a ViT and a text stack of open_clip's own, and nothing else."""
        take_up(tensors, "openai")
        with possible(folder, files.OPEN_CLIP):
            model = described["model_cfg"]
            activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
            return ClipConfig(activation=activation, projection=model["embed_dim"], **open_clip.towers(model))

    def names(self, config: ClipConfig) -> Names:
        return names(config, "openai")

    def write(self, config: ClipConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        refuse_other_norms(config)
        quick = {"quick_gelu": True} if config.activation == "quick_gelu" else {}
        described = {"embed_dim": config.projection, **quick, **open_clip.sections(config.vision, config.text)}
        return described, give(tensors, config, "openai")


class OpenAiFile(OriginalFormat):
    """A `.pt` by OpenAI's names: an archive of TorchScript, a state dict, or a checkpoint of open_clip's trainer."""

    name = "CLIP"
    wrapper = ""

    def lacks(self, tensors: Tensors) -> str:
        keys = {name.removeprefix("module.") for name in tensors}
        return ", ".join({"visual.conv1.weight", "token_embedding.weight", "text_projection"} - keys)

    def architecture(self, tensors: Tensors, described: ClipConfig | None, source: Path) -> ClipConfig:
        """The architecture by the tensors' shapes, or as a YAML beside the file describes it; of an archive the code
        says which activation it is of."""
        for name in [name for name in tensors if name.startswith("module.")]:  # of torch's data-parallel wrapper
            tensors[name.removeprefix("module.")] = tensors.pop(name)
        take_up(tensors, "openai")
        activation = activation_of(source)
        if described is None:
            if activation is None:
                raise ModelError(
                    f"{source} does not say which activation it is of: write {source.with_suffix('.yaml').name} beside "
                    "it, with `extends: clip/vit-b-32-quickgelu` (OpenAI's weights) or `extends: clip/vit-b-32`"
                    " (LAION-2B's), or whichever of models/clip it is."
                )
            with possible(source, "set of tensors"):
                return from_shapes(tensors, activation)
        if activation is None:
            logging.getLogger(__name__).warning(
                "%s does not say which activation it is of; taken for %s, as the YAML beside it says",
                source, described.activation,
            )  # fmt: skip
        elif activation != described.activation:
            raise ModelError(f"{source} is of {activation}, and the YAML beside it says {described.activation}")
        return described

    def names(self, config: ClipConfig) -> Names:
        return names(config, "openai")

    def write(self, config: ClipConfig, tensors: Tensors) -> Tensors:
        """Our tensors by OpenAI's names, as OpenAI's and open_clip's code read them."""
        refuse_other_norms(config)
        return give(tensors, config, "openai")


def from_shapes(tensors: Tensors, activation: Activation) -> ClipConfig:
    """The architecture of OpenAI's tensors. Heads leave no trace in shapes: they are 64 wide in every one of them."""
    towers: dict[str, dict[str, Any]] = {}
    for tower, (blocks, _) in TOWERS.items():
        numbers = [int(name.removeprefix(blocks).split(".")[0]) for name in tensors if name.startswith(blocks)]
        hidden, width = tensors[f"{blocks}0.mlp.c_fc.weight"].shape
        towers[tower[:-1]] = {"width": width, "depth": max(numbers) + 1, "heads": width // 64, "hidden": hidden}
    patch = tensors["visual.conv1.weight"].shape[-1]
    side = math.isqrt(tensors["visual.positional_embedding"].shape[1] - 1) * patch
    towers["vision"] |= {"patch_size": patch, "image_size": side}
    words, positions = tensors["token_embedding.weight"], tensors["positional_embedding"]
    towers["text"] |= {"vocab_size": words.shape[0], "max_positions": positions.shape[1]}
    return ClipConfig(activation=activation, projection=tensors["text_projection"].shape[0], **towers)


def activation_of(source: Path) -> Activation | None:
    """The activation that the code of an archive uses; None of a file without code, or where it uses both."""
    code = torchscript.code(source) if torchscript.is_archive(source) else ""
    gelu, quick_gelu = "torch.gelu(" in code, "torch.sigmoid(" in code
    if gelu == quick_gelu:
        return None
    return "gelu" if gelu else "quick_gelu"


def refuse_other_norms(config: ClipConfig) -> None:
    """Refuse a model whose norms OpenAI's code would compute otherwise; ModelError."""
    if {config.vision.layer_norm_eps, config.text.layer_norm_eps} != {1e-5}:
        raise ModelError("layer_norm_eps is not 1e-5, as it is in OpenAI's and open_clip's code: export it --as hf")


CODE = FamilyCode(
    build=Clip,
    blocks=(VISION_BLOCK,),
    transformers=ClipTransformers(),
    original=OpenAiFile(),
    open_clip=OpenClipFolder(),
    ignored=IGNORED,
)
