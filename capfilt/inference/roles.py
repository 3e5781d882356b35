"""Does a model fit a role? Asked once, of its folder or its architecture, before any weight is loaded.

A captioner must be able to decode; a filter must encode images, and encode texts, for itc, or fuse the two, for itm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from capfilt.data.images.preprocess import Preprocess
from capfilt.data.loading.config import LoaderConfig
from capfilt.data.policy import check_scores
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.data.text.tokenizer import MAX_CHARACTERS, Tokenizer
from capfilt.errors import ModelError, RecipeError
from capfilt.inference.config import DecodeConfig
from capfilt.models import Architecture, preprocess_of
from capfilt.models.architecture import ModelRole
from capfilt.models.checkpoints import store
from capfilt.storage.paths import StoragePath

NEEDS: dict[ModelRole, frozenset[str]] = {
    "captioner": frozenset({"encode_image", "decode"}),
    "filter": frozenset({"encode_image", "encode_text"}),
}
"""The capabilities without which a model cannot play a role; a filter that can fuse need not encode texts."""


def lacking(role: ModelRole, capabilities: frozenset[str]) -> frozenset[str]:
    """What a model of these capabilities lacks for a role."""
    missing = NEEDS[role] - capabilities
    return missing - {"encode_text"} if role == "filter" and "fuse" in capabilities else missing


def check_capabilities(role: ModelRole, model: object, capabilities: frozenset[str]) -> None:
    """Refuse a model that cannot play a role; `model` is how a person knows it. RecipeError."""
    if missing := lacking(role, capabilities):
        raise RecipeError(
            f"{model} cannot be the {role}: it cannot {', '.join(sorted(missing))}."
            f" A {role} must be able to {', '.join(sorted(NEEDS[role]))}."
        )


def scores_given(capabilities: frozenset[str]) -> tuple[str, ...]:
    """The scores that a filter gives: itm if it can fuse, itc if it can encode texts alone."""
    return tuple(score for score, need in (("itm", "fuse"), ("itc", "encode_text")) if need in capabilities)


def check_captioner(model: StoragePath, decode: DecodeConfig) -> Architecture:
    """Refuse a saved model that cannot be the captioner, or a prompt that is too long for it; its architecture."""
    architecture = store.architecture(model)
    check_capabilities("captioner", model, architecture.capabilities)
    preprocess_for(model, architecture)
    check_prompt(tokenizer_for(model, architecture), decode)
    return architecture


def check_filter(model: StoragePath, scores: Iterable[str] = ()) -> Architecture:
    """Refuse a saved model that cannot be the filter, or does not give these scores; its architecture."""
    architecture = store.architecture(model)
    check_capabilities("filter", model, architecture.capabilities)
    check_scores(scores, scores_given(architecture.capabilities), model)
    preprocess_for(model, architecture)
    tokenizer_for(model, architecture)
    return architecture


def check_any_role(model: StoragePath, decode: DecodeConfig) -> Architecture:
    """Refuse a saved model that can play neither role, of which nothing can be measured; its architecture."""
    architecture = store.architecture(model)
    able = architecture.capabilities
    if lacking("captioner", able) and lacking("filter", able):
        raise RecipeError(
            f"{model} can be neither captioner nor filter; what it was fine-tuned for is measured with --task TASK."
        )
    return check_filter(model) if lacking("captioner", able) else check_captioner(model, decode)


def check_prompt(tokenizer: Tokenizer, config: DecodeConfig) -> None:
    """Refuse a prompt that leaves no room for a text. RecipeError."""
    prompt = tokenizer.decoder_prompt(config.prompt, MAX_CHARACTERS)
    if len(prompt) >= config.max_length:
        raise RecipeError(
            f"decode.prompt has {len(prompt)} tokens with the one that a text begins with, and decode.max_length "
            f"{config.max_length} leaves none for the text: shorten the prompt, or set "
            f"decode.max_length={len(prompt) + 20} or more"
        )


def check_prompts(
    tokenizer: str,
    architecture: Architecture,
    loaders: Mapping[str, LoaderConfig],
    decodes: Sequence[DecodeConfig] = (),
) -> None:
    """Refuse a prompt that leaves no token for the text after it, of trainings (`loaders`, by name) or, where the model
    can decode, of captioners. RecipeError."""
    loaded = tokenizer_of(tokenizer, architecture.tokenizer_kind)
    for decode in decodes if "decode" in architecture.capabilities else ():
        check_prompt(loaded, decode)
    for where, loader in loaders.items():
        prompt = len(loaded.encode([loader.prompt], MAX_CHARACTERS)[0][0])  # with a beginning and an end
        if loader.prompt and prompt >= loader.max_length:
            raise RecipeError(
                f"{where}.loader.prompt has {prompt} tokens with the ends of a text, and loader.max_length "
                f"{loader.max_length} leaves none for the text: shorten the prompt, or set "
                f"{where}.loader.max_length={prompt + 20} or more"
            )


def tokenizer_for(model: StoragePath, architecture: Architecture) -> Tokenizer:
    """The tokenizer of a saved model.

    Raises:
        TextError: none there, or one that cannot be used.
        ModelError: one with more tokens than the model has embeddings for.
    """
    tokenizer = tokenizer_of(model, architecture.tokenizer_kind)
    if len(tokenizer) > architecture.vocabulary_size:
        raise ModelError(
            f"{model}: its tokenizer has {len(tokenizer)} entries, [DEC] and [ENC] included, and the model knows "
            f"{architecture.vocabulary_size}; it is the tokenizer of another model"
        )
    return tokenizer


def preprocess_for(model: StoragePath, architecture: Architecture) -> Preprocess:
    """How a saved model wants its pictures. ModelError where that cannot be done."""
    return Preprocess.read(model, architecture.image_size, preprocess_of(architecture))


def save_preprocess(model: StoragePath, architecture: Architecture, folder: StoragePath) -> None:
    """Write how a saved model wants its pictures into another folder of it."""
    preprocess_for(model, architecture).save(folder, architecture.image_size, preprocess_of(architecture))
