"""The page of `retrieve`: a query, and the pictures nearest to it, read from the shards that the index names.

Keys, names and texts come from the web: the template escapes them, and pictures are decoded and encoded again.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from capfilt.errors import ShardError
from capfilt.printable import printable
from capfilt.reporting.page import fill
from capfilt.reporting.thumbnails import MAX_SIZE, MAX_THUMBNAIL_BYTES, thumbnail, thumbnails

TEMPLATE = "neighbours.html.j2"


def render_neighbours(record: Mapping[str, Any], query: bytes | None) -> str:
    """What `retrieve` found as HTML; `query`: the picture that was looked for, encoded.

    A picture whose shard cannot be read has no thumbnail, and a note says why.
    """
    hits, notes = record["hits"], []
    made: dict[tuple[str, str], str] = {}
    for shard in sorted({hit["shard"] for hit in hits}):
        here = [hit for hit in hits if hit["shard"] == shard]
        wanted = {(shard, hit["key"]) for hit in here}
        try:
            made |= thumbnails(
                {shard: here[0]["url"]} if here[0]["url"] else {},
                wanted,
                MAX_THUMBNAIL_BYTES * len(wanted) // len(hits),
            )
        except ShardError as error:
            notes.append(f"without pictures of {printable(shard)}: {error}")
    small = None if query is None else thumbnail(query, MAX_SIZE)
    shown = [
        {
            "cosine": f"{hit['cosine']:.4f}",
            "key": printable(hit["key"]),
            "uid": printable(hit["uid"]),
            "shard": printable(hit["shard"]),
            "picture": made.get((hit["shard"], hit["key"])),
        }
        for hit in hits
    ]
    picture = small and f"data:image/webp;base64,{base64.b64encode(small).decode()}"
    query_text = printable(record["query"])
    return fill(TEMPLATE, (), None, notes, query=query_text, picture=picture, hits=shown, rows=record["rows"])
