"""What the functions of the API return: frozen dataclasses with paths, counts, and a way to walk the rows.

Each has a `record`, which is what the same verb of the command line prints with `--json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capfilt.api.arguments import location

if TYPE_CHECKING:
    from capfilt.api.reading import Annotations
    from capfilt.data.sample import Sample
    from capfilt.storage.paths import StoragePath

Record = dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """What became of the samples: `num_in = kept + dropped + failed`, always."""

    num_in: int
    kept: int
    dropped: int
    failed: int

    @classmethod
    def of(cls, samples: Mapping[str, int]) -> Counts:
        return cls(samples["in"], samples["kept"], samples.get("dropped", 0), samples["failed"])


@dataclass(frozen=True)
class TextCounts:
    """What became of the texts of the samples that did not fail."""

    num_in: Mapping[str, int]
    """By source: web, synthetic, human."""
    kept: Mapping[str, int]
    """By source."""
    dropped: Mapping[str, int]
    """By "source: reason"."""

    @classmethod
    def of(cls, texts: Mapping[str, Mapping[str, int]]) -> TextCounts:
        return cls(texts["in"], texts["kept"], texts["dropped"])


@dataclass(frozen=True)
class AnnotateResult:
    """Annotated shards."""

    out: StoragePath
    """The run folder."""
    annotations: StoragePath
    """The folder with one Parquet a shard."""
    samples: Counts
    texts: TextCounts
    failed: Mapping[str, int]
    """How many samples failed, by reason."""
    record: Record = field(repr=False)

    @classmethod
    def of(cls, out: StoragePath, record: Record) -> AnnotateResult:
        samples, texts = Counts.of(record["samples"]), TextCounts.of(record["texts"])
        return cls(out, location(record["annotations"]), samples, texts, record["failed"], record)

    def rows(self) -> Annotations:
        """Every annotation, one shard in memory at a time."""
        from capfilt.api.reading import read_annotations

        return read_annotations(self.annotations)


@dataclass(frozen=True)
class SelectResult:
    """Cleaned shards."""

    out: StoragePath
    """The run folder."""
    dataset: StoragePath
    """The folder with one tar of kept samples and one Parquet of verdicts a shard."""
    threshold: float | None
    """The number that was applied; None for a policy without one."""
    samples: Counts
    texts: TextCounts
    failed: Mapping[str, int]
    """How many samples failed, by reason."""
    record: Record = field(repr=False)

    @classmethod
    def of(cls, out: StoragePath, record: Record) -> SelectResult:
        samples, texts = Counts.of(record["samples"]), TextCounts.of(record["texts"])
        dataset, threshold = location(record["dataset"]), record.get("threshold")
        return cls(out, dataset, threshold, samples, texts, record["failed"], record)

    def rows(self) -> Annotations:
        """Every annotation with its verdict and why, one shard in memory at a time."""
        from capfilt.api.reading import read_annotations

        return read_annotations(self.dataset)

    def kept(self) -> Iterator[Sample]:
        """The samples that were kept, with the texts that were, streamed from the tars."""
        from capfilt.api.reading import read_shards

        return read_shards(self.dataset)


@dataclass(frozen=True)
class Round:
    """One round of a bootstrap."""

    number: int
    """0 is the baseline, trained on uncleaned pairs."""
    folder: StoragePath
    models: Mapping[str, StoragePath]
    """The folder of each model that the round trained: captioner, filter, pretrain, or a BLIP-2's stages."""
    figures: Record
    """Retrieval, captioning and filter metrics, texts kept; a figure that was not measured is absent."""

    def rows(self) -> Annotations:
        """Every annotation of this round with its verdict; round 0 has none."""
        from capfilt.api.reading import read_annotations

        return read_annotations(self.folder / "dataset")


@dataclass(frozen=True)
class BootstrapResult:
    """A run of CapFilt, all of its rounds."""

    out: StoragePath
    """The run folder."""
    rounds: tuple[Round, ...]
    report: StoragePath
    """The run as an HTML page."""
    seconds: float
    """Of work on this run folder, by all calls together."""
    record: Record = field(repr=False)

    def rows(self) -> Iterator[tuple[int, Annotations]]:
        """The annotations of each round after the baseline, with the round's number."""
        return ((done.number, done.rows()) for done in self.rounds if done.number)


@dataclass(frozen=True)
class PretrainResult:
    """A trained model."""

    out: StoragePath
    """The run folder."""
    model: StoragePath
    """The model's folder."""
    record: Record = field(repr=False)

    def rows(self) -> Iterator[Record]:
        """The training's log, in the order of its steps: losses, learning rate, speed."""
        from capfilt.api.reading import read_log

        return read_log(self.model.parent / "log.jsonl")


@dataclass(frozen=True)
class EvaluateResult:
    """Metrics of a model."""

    model: str
    out: StoragePath | None
    """The run folder; None where none was given."""
    metrics: Record
    """By task: retrieval, captioning, filter; a metric that cannot be measured on these shards is absent."""
    record: Record = field(repr=False)

    def rows(self) -> Iterator[tuple[str, float]]:
        """Each metric by its dotted name, such as ("retrieval.tr@1", 29.0)."""
        return leaves(self.metrics)


@dataclass(frozen=True)
class Scores:
    """How well a text matches an image; None where the text has nothing to read, or the model has no such score."""

    itm: float | None
    """The probability that they match, in [0, 1]."""
    itc: float | None
    """The cosine of their embeddings, in [-1, 1]."""


@dataclass(frozen=True)
class Caption:
    """A text that beam search wrote."""

    text: str
    score: float
    """Its log-probability divided by its length to the power `decode.length_penalty`; what counts as length says
    `decode.accounting`. Higher is better; comparable between texts of one image."""


@dataclass(frozen=True)
class ExportResult:
    """A model written in another format."""

    model: StoragePath
    """What was read."""
    form: str
    written: tuple[StoragePath, ...]
    """Folders or files."""
    left_behind: Mapping[str, int]
    """How many tensors were left out, by reason."""
    record: Record = field(repr=False)


@dataclass(frozen=True)
class ReportResult:
    """A run, or two side by side, as an HTML page."""

    page: StoragePath
    bytes: int
    rounds: int
    texts: int
    """How many texts the gallery shows."""
    joined: int | None
    """Of two runs: how many images of the page both have, 0 where they share none; None for one run."""
    record: Record = field(repr=False)


@dataclass(frozen=True)
class StageStatus:
    """How far one stage of a run is."""

    stage: str
    label: str
    folder: str
    """Within the run folder."""
    done: int
    total: int
    unit: str
    """What `done` and `total` count."""
    samples: Mapping[str, int]
    failed: Mapping[str, int]
    """How many samples failed, by reason."""
    errors: Mapping[str, int]
    """How many shards failed, by reason."""
    per_second: float | None
    seconds_left: float | None
    usage: Mapping[str, Any] | None = None
    """Images per second of one worker, CPU-seconds and GPU-seconds; None where they were not measured."""
    cost: Mapping[str, float] | None = None
    """With a price, `usd`, `usd_expected` and `usd_per_million_images`, those that are known."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is."""

    run: StoragePath
    state: str
    """working, died, stopped or done, and by whom."""
    stages: tuple[StageStatus, ...]
    record: Record = field(repr=False)
    cost: Mapping[str, Any] | None = None
    """With a price, what all stages cost together: as of a stage, and `usd_per_million_kept_texts`."""

    @property
    def done(self) -> bool:
        """Whether every stage that was begun is complete."""
        return self.state.startswith("done")


@dataclass(frozen=True)
class Damage:
    """A committed piece of work that is not what its record says."""

    stage: str
    folder: str
    """Within the run folder."""
    shard: str
    why: str


@dataclass(frozen=True)
class Verification:
    """Whether what a run committed is what its ledger says."""

    run: StoragePath
    shards: int
    """Pieces of work that were checked."""
    files: int
    bytes: int
    undone: int
    """Shards that are planned and not done yet."""
    broken: tuple[Damage, ...]
    withdrawn: int
    """How many of those `mend` withdrew: the call that made them does them again."""
    changed_inputs: tuple[Damage, ...]
    """Shards that are not what the run read, where `inputs` were checked."""
    record: Record = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.broken and not self.changed_inputs

    def rows(self) -> Iterator[Damage]:
        """What does not hold, inputs last."""
        yield from self.broken
        yield from self.changed_inputs


@dataclass(frozen=True)
class Explanation:
    """What happened to one image, through all rounds."""

    image: str
    """The key, uid or sha256 that was given."""
    models: Mapping[str, str]
    """Where the models that wrote and scored its texts lie in the run folder, by their fingerprints."""
    record: Record = field(repr=False)
    heatmap: StoragePath | None = None
    """The drawn heatmap, of `heatmap=True`."""

    def rows(self) -> Iterator[Record]:
        """The rows of the run's tables that are about this image, with `folder`, `stage` and `shard`."""
        for table in self.record["found"]:
            for row in table["rows"]:
                yield {"folder": table["folder"], "stage": table["stage"], "shard": table["shard"], **row}

    def lines(self) -> Iterator[str]:
        """The same as the command line prints it."""
        from capfilt.pipelines.inspect import explain

        return explain.lines(self.record)


@dataclass(frozen=True)
class Recipe:
    """A recipe or an architecture in full, every default spelled out."""

    yaml: str
    """With `explain`, a comment above each key."""
    settings: Record
    """The same as plain dicts and lists."""
    notes: tuple[str, ...] = ()
    """What does not fit and may be meant, and what could not be checked on this machine."""
    keys: Record = field(default_factory=dict)
    """With `explain`: the dotted name of each key -> its `value`, `meaning`, what is `allowed`, its `default`."""


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
