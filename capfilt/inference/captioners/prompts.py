"""What a vision-language model is asked about an image: named prompts, with the web text in them where they want it.

What comes from the web is data and never part of the conversation: it is cut to a length, and nothing in it can end a
turn, begin a picture or name another field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from capfilt.data.sample import Sample
from capfilt.inference.captioners.guard_rails import CONTROL
from capfilt.printable import short_repr

if TYPE_CHECKING:
    from capfilt.inference.config import VlmConfig

IGNORE, PREFIX = "ignore", "prefix"
"""Prompts of the image alone; and of a captioner of ours whose text goes on from the web text
(`AnnotateConfig.web_prefix`)."""
TEMPLATES: Mapping[str, str] = {
    IGNORE: "Describe this image in one or two sentences. Answer with the description only.",
    "edit": "The text below came with this image on the web. Correct it so that it describes the image: keep the names"
    " and facts that fit, remove what the image does not show, add what is missing. Answer with the corrected text"
    " only.\nText: {alt}",
    "fuse": "Describe this image in one or two sentences. Use the names and facts of the web text below that fit the"
    " image, and ignore the rest of it. Answer with the description only.\nWeb text: {alt}",
}
"""The prompts that there are by name. `ignore` sees the image alone; `edit` corrects the web text (alt-text editing);
`fuse` describes the image with its help (CapsFusion 2023, KALE 2024)."""

_FIELD = re.compile(r"\{([A-Za-z_][\w.-]*)\}")
_MARKUP = re.compile(r"<[^<>\s][^<>]{0,60}>|\[/?[A-Z_]{2,20}\]")
"""What chat templates mark turns, pictures and ends with (<|im_end|>, <image>, </s>, [INST]), and HTML's tags."""


class Prompt(NamedTuple):
    """What is asked for one caption."""

    kind: str
    text: str


class MissingFieldError(Exception):
    """A sample without a field that a template names; its argument is the field."""


def templates(config: VlmConfig) -> dict[str, str]:
    """All prompts by name, those of the settings over those that there are."""
    return {**TEMPLATES, **config.templates}


def prompts_of(sample: Sample, captions: int, config: VlmConfig, tokens: Iterable[str] = ()) -> list[Prompt]:
    """The prompt of each caption of an image: the kinds of the settings in turn.

    A sample that lacks what a template names gets `ignore` in its place, which says so in its name.

    Args:
        tokens: what the model's tokenizer reads as one special token; none stays in what comes from the sample.
    """
    known = templates(config)

    def prompt(kind: str) -> Prompt:
        try:
            return Prompt(kind, fill(known[kind], sample, config.field_characters, tokens))
        except MissingFieldError:
            return Prompt(IGNORE, known[IGNORE])

    by_kind = {kind: prompt(kind) for kind in dict.fromkeys(config.prompts)}
    return [by_kind[config.prompts[c % len(config.prompts)]] for c in range(captions)]


def fill(template: str, sample: Sample, characters: int, tokens: Iterable[str] = ()) -> str:
    """A template with the fields of a sample: `{alt}`, its first web text, and `{NAME}`, a text or number of its json.

    Each field is put in once: what looks like a field in a web text stays as it is.
    """

    def value(match: re.Match[str]) -> str:
        text = clean(_field(sample, match[1]), characters, tokens)
        if not text:
            raise MissingFieldError(match[1])
        return text

    return _FIELD.sub(value, template)


def instruction(template: str) -> str:
    """What a template says itself, without the fields."""
    return _FIELD.sub(" ", template)


def web_text(sample: Sample) -> str:
    """The first text that came from the web with an image; "" for none."""
    return next((caption["text"] for caption in sample.captions if caption["source"] == "web"), "")


def _field(sample: Sample, name: str) -> str:
    if name == "alt":
        return web_text(sample)
    value = sample.meta.get(name)
    return str(value) if isinstance(value, str | int | float) else ""


def clean(text: str, characters: int, tokens: Iterable[str] = ()) -> str:
    """A text from the web as a prompt may have it: one line, at most so many characters, without anything that a chat
    template could take for its own."""
    text = CONTROL.sub(" ", text[: 20 * characters].encode("utf-8", "replace").decode())
    special = [token for token in tokens if token.strip()]
    before = ""
    while text != before:  # what is taken out may bring the halves of another together
        before, text = text, _MARKUP.sub(" ", text)
        for token in special:
            text = text.replace(token, " ")
    text = " ".join(text.split())
    if len(text) <= characters:
        return text
    return text[: characters + 1].rsplit(" ", 1)[0][:characters].rstrip()


def check_templates(prompts: Iterable[str], templates: Mapping[str, str]) -> None:
    """Refuse prompts that no template has the name of, and templates that ask for nothing. ValueError."""
    known = {**TEMPLATES, **templates}
    for kind in prompts:
        if kind not in known:
            raise ValueError(
                f"there is no prompt {short_repr(kind)}; there are: {', '.join(known)}. Give vlm.templates.{kind}"
            )
    for kind, template in templates.items():
        if not re.fullmatch(r"[a-z0-9_-]{1,40}", kind):
            raise ValueError(f"a prompt's name has small letters, digits, - and _ alone, not {short_repr(kind)}")
        if not template.strip():
            raise ValueError(f"the template {kind} is empty")
    if _FIELD.search(known[IGNORE]):
        raise ValueError(f"the template {IGNORE} names a field; it is for samples that have none")
