"""What the page of a run shows, as plain numbers and texts, and how much of it there may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capfilt.reporting.charts import Histogram

if TYPE_CHECKING:
    from capfilt.reporting.sections import Cell

COLUMNS = ("image", "source", "candidate", "text", "itm", "itc", "fixed", "truth", "kind", "label")
"""The columns of the texts in the page, before those of further scores. image, source, fixed and kind are positions in
lists, -1 for none; a fixed of -2 is kept whatever the threshold; truth and
label are 1 for right, 0 for wrong, -1 for unknown, and a label that was not given at random is 2 more; itm and itc are
null where a text has no score."""
MAX_WORDS = 30
"""Texts of as many words or more share the last bin of the lengths."""
MAX_ROUNDS = 100
"""Rounds in the page: the newest."""
MAX_TRAININGS = 20
"""Trainings of one kind, one line each in the charts of losses: the newest."""
MAX_STAGES = 1000
"""Rows of what stages used."""
MAX_LINES = 64
"""Notes, charts of losses, and reasons of a round."""

Series = Mapping[str, Sequence[tuple[float, float]]]
"""(x, y) points by name."""


@dataclass(frozen=True)
class Training:
    """The losses of one training, by step."""

    what: str
    """pretrain | captioner | filter | a stage of BLIP-2"""
    round: int
    losses: Series


@dataclass(frozen=True)
class AnnotationCounts:
    """Counts over all annotations of a round, whatever the page holds of them."""

    images: int
    """Images that could be read."""
    failed: Mapping[str, int]
    """Images that could not, by class of reason."""
    texts: Mapping[str, int]
    """Texts that contain anything to read, by source."""
    kept_images: int
    """Images with a kept text. This and the next two are of the policy, or of the threshold to try before there is
    one."""
    kept: Mapping[str, int]
    """By source."""
    dropped: Mapping[str, int]
    """By "source: reason"."""
    medians: Mapping[str, Mapping[str, float]]
    """By score and source, to a thousandth of the score's range."""
    auc: Mapping[str, float]
    """By score, over web texts of known truth, to about a thousandth."""


@dataclass(frozen=True)
class AnnotatedRound:
    """The annotations of one round: counts over all of them, and the texts that are in the page."""

    round: int
    score: str
    threshold: float
    select_command: str
    """The `capfilt select` command that would apply another threshold, without its --out and --set."""
    out_prefix: str
    """The beginning of the --out of such a command; both are quoted for a shell."""
    totals: Mapping[str, int]
    """Texts that have a verdict, by source."""
    histograms: Mapping[str, Mapping[str, Histogram]]
    """By score and source."""
    lengths: Mapping[str, Sequence[int]]
    """By source: the number of texts of 0, 1, .. MAX_WORDS words."""
    diversity: Mapping[str, Mapping[str, float]]
    """By source: distinct1, distinct2 and repeated, of `texts` texts."""
    texts: Mapping[str, list[Any]]
    """By name of COLUMNS, one value a text."""
    full_lengths: Mapping[int, int] = field(default_factory=dict)
    """By position in `texts`, the number of characters of a text that is shortened in the page."""
    decided: bool = True
    """Whether a policy ran. Before that nothing is kept or dropped, and `score` and `threshold` are a proposal."""
    policy: str = ""
    """The policy that ran, in a few words."""
    counts: AnnotationCounts | None = None
    movable: Sequence[str] = ()
    """The scores whose threshold the page moves; () = all that it has."""
    human_auc: Mapping[str, float] = field(default_factory=dict)
    """By score, the filter's AUC on human pairs against shuffled ones, where it was measured."""
    filter: str = ""
    """The fingerprint of the model that scored the texts; "" where there are several."""
    heatmaps: Mapping[int, str] = field(default_factory=dict)
    """By position in `texts`, the picture under the heatmap of that text, a data: URL."""


Table = tuple[list[str], list[list["Cell"]]]
"""Headings and rows."""


@dataclass(frozen=True)
class Contamination:
    """The section about held-out sets; all of its texts are printable and short."""

    verdict: str
    """One line."""
    sets: Table
    """What was found in each."""
    tests: Table
    """What the self-test found."""
    examples: Table
    """Some of the contaminated samples."""


@dataclass(frozen=True)
class Usage:
    """What the workers of each stage used, as a table."""

    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    """One a stage."""
    notes: Sequence[str] = ()
    """What all of it costs, where a price was given."""


@dataclass(frozen=True)
class PageData:
    """Everything that the page shows."""

    name: str
    command: str
    rounds: Sequence[Mapping[str, Any]] = ()
    """The entries of summary.json."""
    seconds: float | None = None
    finished: str = ""
    trainings: Sequence[Training] = ()
    annotated_rounds: Sequence[AnnotatedRound] = ()
    images: Sequence[tuple[str, str | None]] = ()
    """Key and thumbnail (a data: URL, or None) of every image in the page, in random order."""
    identities: Sequence[tuple[str, str]] = ()
    """Shard and uid of each of them."""
    reasons: Sequence[tuple[str, str, bool]] = ()
    """Why a text is dropped whatever the threshold: in full, its class, and whether it is a failure."""
    kinds: Sequence[str] = ()
    """The kinds of wrong texts, where the truth is known."""
    notes: Sequence[str] = ()
    """What a reader must know: what was sampled, what is missing."""
    usage: Usage = Usage()
    contamination: Contamination | None = None
    """What of held-out sets was found, where that was asked."""
