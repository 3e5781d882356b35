"""The kinds of failure that a URL can end with: a small set, so that they can be counted.

A failure travels through img2dataset as the text "kind: detail", or "kind" alone, in its `error_message` column.
"""

from __future__ import annotations

import re

PLACEHOLDER = "placeholder"
KINDS = {
    "bad-url": "not an address that can be fetched: not http(s), no host, or with a password",
    "private-address": "the host, or one that it redirects to, is not on the public internet",
    "dns": "the name has no address",
    "refused": "the host refuses the connection",
    "unreachable": "no route to the host",
    "timeout": "no answer, or not the whole of it, within its time",
    "tls": "the certificate or the encryption is not in order",
    "cut": "the connection ended before the picture did",
    "bad-answer": "the answer is not HTTP, or has absurd headers",
    "redirects": "more redirects than allowed, or one without a location",
    "long-pause": "the host answered 429 or 503 and asked for a longer pause than one URL may cause",
    "paused": "the host has repeatedly asked for a pause longer than a sample may take",
    "robots": "robots.txt does not allow it",
    "opt-out": "X-Robots-Tag does not allow it",
    "too-big": "more bytes than allowed, as sent or decompressed",
    "encoding": "a content encoding that was not asked for",
    "not-an-image": "not a JPEG, PNG, WebP, GIF or BMP",
    "truncated": "a picture without its end",
    "too-many-pixels": "larger than allowed, by its header, or once it is resized",
    "too-small": "smaller than --min-image-size",
    "too-narrow": "longer than --max-aspect-ratio allows",
    "broken-image": "it begins as a picture and cannot be decoded",
    PLACEHOLDER: "the same bytes under many URLs",
    "lost": "img2dataset gave no answer for this row, or something other than its host failed",
}
"""Each kind and what it means. Beside these there is http-NNN for every status that is not 2xx."""

TRANSIENT = frozenset({"dns", "refused", "unreachable", "timeout", "cut", "http-500", "http-502", "http-504"})
"""Kinds that another try a moment later may not meet. 429 and 503 are not among them: they ask for a pause."""

_STATUS = re.compile(r"http-\d{3}")


class Failure(Exception):
    """Ends one URL: its kind, one of KINDS or http-NNN, and a detail for the person who reads it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        assert kind in KINDS or _STATUS.fullmatch(kind), kind
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


def with_kind(status: str, message: str | None) -> str:
    """The `error_message` of a failed row, "kind: detail"; messages of img2dataset itself are given their kind.

    `status`: img2dataset's, failed_to_download or failed_to_resize.
    """
    text = " ".join((message or "").split())[:300]
    if (kind := kind_of(text)) in KINDS or _STATUS.fullmatch(kind):
        return text
    if status == "failed_to_resize":
        return f"broken-image: {text}"
    # img2dataset parses the URL by urllib before it calls our client, and reports errors in urllib's words.
    return f"bad-url: {text}" if text and status == "failed_to_download" else f"lost: {text}"


def kind_of(message: str) -> str:
    """The kind in front of an `error_message`."""
    return message.partition(":")[0]
