"""How a URL can fail: a small set of kinds, so that they can be counted, each with its meaning.

A failure travels through img2dataset as the text "kind: detail", or "kind" alone, in its `error_message` column.
"""

from __future__ import annotations

import re

KINDS = {
    "bad-url": "no address that can be fetched: not http(s), no host, a password in it",
    "private-address": "the host, or one that it redirects to, is not on the public internet",
    "dns": "the name has no address",
    "refused": "nobody listens there",
    "unreachable": "no route to the host",
    "timeout": "no answer, or not the whole of it, within its time",
    "tls": "the certificate or the encryption is not in order",
    "cut": "the connection ended before the picture did",
    "bad-answer": "what came is not HTTP, or has absurd headers",
    "redirects": "more redirects than allowed, or one that leads nowhere",
    "long-pause": "the host answered 429 or 503 and asked for a longer pause than one URL may cause it",
    "paused": "the host has asked again and again for a pause longer than a sample may take",
    "robots": "robots.txt does not allow it",
    "opt-out": "X-Robots-Tag does not allow it",
    "too-big": "more bytes than allowed, as sent or unpacked",
    "encoding": "a content encoding that was not asked for",
    "not-an-image": "not a JPEG, PNG, WebP, GIF or BMP",
    "truncated": "a picture without its end",
    "too-many-pixels": "larger than allowed, by its header, or once it is resized",
    "too-small": "smaller than --min-image-size",
    "too-narrow": "longer than --max-aspect-ratio allows",
    "broken-image": "it begins as a picture and cannot be decoded",
    "placeholder": "the same bytes under many URLs",
    "lost": "img2dataset gave no answer for this row, or something else than its host failed",
}
"""Beside these there is http-NNN for every status that is not 2xx."""

TRANSIENT = frozenset({"dns", "refused", "unreachable", "timeout", "cut", "http-500", "http-502", "http-504"})
"""Kinds that another try a moment later may mend. 429 and 503 are not among them: they ask for a pause."""

_STATUS = re.compile(r"http-\d{3}")


class Failure(Exception):
    """The end of one URL: its kind and what was found."""

    def __init__(self, kind: str, detail: str = "") -> None:
        assert kind in KINDS or _STATUS.fullmatch(kind), kind
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


def classified(status: str, message: str | None) -> str:
    """The `error_message` of a failed row with its kind in front; what img2dataset says itself has none yet."""
    text = " ".join((message or "").split())[:300]
    if (kind := kind_of(text)) in KINDS or _STATUS.fullmatch(kind):
        return text
    if status == "failed_to_resize":
        return f"broken-image: {text}"
    # Before it asks the visitor, img2dataset takes the URL apart, in urllib's way and words.
    return f"bad-url: {text}" if text and status == "failed_to_download" else f"lost: {text}"


def kind_of(message: str) -> str:
    """The kind in front of an `error_message`."""
    return message.partition(":")[0]
