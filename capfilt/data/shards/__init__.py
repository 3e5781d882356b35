"""Shards: tars of samples in img2dataset's layout, listed (`expand`), streamed (`read`) and written (`write`).

Folders of pictures, tables and captions as JSON are read as if they were some (`sources`).

Nothing is ever extracted to disk, and a broken shard is no exception: `read` yields what can be read and one
`FailedSample` for each key that cannot. Only what the user can mend (a missing file, a dead connection) is raised, as
`ShardError`.
"""

from __future__ import annotations

from capfilt.data.shards.files import (
    Digest,
    identities,
    identity,
    read,
    read_input,
    read_lines,
    stat,
    stats,
    write,
    write_sizes,
)
from capfilt.data.shards.lines import is_lines
from capfilt.data.shards.urls import (
    MAX_NAME,
    MAX_SHARDS,
    TARS,
    by_name,
    expand,
    name,
    on_a_store,
    patterns,
    places,
    renamed,
)
