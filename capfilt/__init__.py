"""capfilt: captioner and filter, pretrained in rounds on web pairs that they have cleaned themselves.

Everything public is a name of this module and is imported when it is first used: `import capfilt` itself imports
nothing else, sets no environment variable, configures no logging and queries no device.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`
if TYPE_CHECKING:
    from capfilt.api.commands import annotate, bootstrap, evaluate, finetune, pretrain, select
    from capfilt.api.data import (
        ConvertResult,
        DataExportResult,
        DownloadResult,
        PackResult,
        convert,
        download,
        export_data,
        pack,
    )
    from capfilt.api.estimates import EstimateResult, estimate
    from capfilt.api.inspection import explain, export, report, show, status, verify, watch
    from capfilt.api.models import LoadedModel, load_model
    from capfilt.api.near import (
        DecontaminateResult,
        DedupResult,
        EmbedResult,
        IndexResult,
        Neighbour,
        RetrieveResult,
        build_index,
        decontaminate,
        dedup,
        embed,
        retrieve,
    )
    from capfilt.api.progress import ProgressEvent
    from capfilt.api.reading import Annotations, Verdict, read_annotations, read_shards
    from capfilt.api.results import (
        AnnotateResult,
        BootstrapResult,
        Caption,
        Counts,
        Damage,
        EvaluateResult,
        Explanation,
        ExportResult,
        PretrainResult,
        Recipe,
        ReportResult,
        Round,
        RunStatus,
        Scores,
        SelectResult,
        StageStatus,
        TextCounts,
        Verification,
    )
    from capfilt.data.annotations import Annotation
    from capfilt.data.loading.webdataset_reader import webdataset
    from capfilt.data.sample import FailedSample, Sample
    from capfilt.errors import (
        CapfiltError,
        ClusterError,
        DataError,
        ImageError,
        LockLostError,
        ModelError,
        RecipeError,
        RunError,
        ShardError,
        ShortfallError,
        StorageError,
        TextError,
        TimeLimitError,
        UsageError,
    )
    from capfilt.runs.progress import Progress

__version__ = "0.1.0"

__all__ = [
    "AnnotateResult",
    "Annotation",
    "Annotations",
    "BootstrapResult",
    "CapfiltError",
    "Caption",
    "ClusterError",
    "ConvertResult",
    "Counts",
    "Damage",
    "DataError",
    "DataExportResult",
    "DecontaminateResult",
    "DedupResult",
    "DownloadResult",
    "EmbedResult",
    "EstimateResult",
    "EvaluateResult",
    "Explanation",
    "ExportResult",
    "FailedSample",
    "ImageError",
    "IndexResult",
    "LoadedModel",
    "LockLostError",
    "ModelError",
    "Neighbour",
    "PackResult",
    "PretrainResult",
    "Progress",
    "ProgressEvent",
    "Recipe",
    "RecipeError",
    "ReportResult",
    "RetrieveResult",
    "Round",
    "RunError",
    "RunStatus",
    "Sample",
    "Scores",
    "SelectResult",
    "ShardError",
    "ShortfallError",
    "StageStatus",
    "StorageError",
    "TextCounts",
    "TextError",
    "TimeLimitError",
    "UsageError",
    "Verdict",
    "Verification",
    "__version__",
    "annotate",
    "bootstrap",
    "build_index",
    "convert",
    "decontaminate",
    "dedup",
    "download",
    "embed",
    "estimate",
    "evaluate",
    "explain",
    "export",
    "export_data",
    "finetune",
    "load_model",
    "pack",
    "pretrain",
    "read_annotations",
    "read_shards",
    "report",
    "retrieve",
    "select",
    "show",
    "status",
    "verify",
    "watch",
    "webdataset",
]

_MODULES = {
    "api.commands": ("annotate", "bootstrap", "evaluate", "finetune", "pretrain", "select"),
    "api.data": (
        *("ConvertResult", "DataExportResult", "DownloadResult", "PackResult"),
        *("convert", "download", "export_data", "pack"),
    ),
    "api.estimates": ("EstimateResult", "estimate"),
    "api.inspection": ("explain", "export", "report", "show", "status", "verify", "watch"),
    "api.models": ("LoadedModel", "load_model"),
    "api.near": (
        "DecontaminateResult", "DedupResult", "EmbedResult", "IndexResult", "Neighbour", "RetrieveResult",
        "build_index", "decontaminate", "dedup", "embed", "retrieve",
    ),
    "api.progress": ("ProgressEvent",),
    "api.reading": ("Annotations", "Verdict", "read_annotations", "read_shards"),
    "api.results": (
        "AnnotateResult", "BootstrapResult", "Caption", "Counts", "Damage", "EvaluateResult", "Explanation",
        "ExportResult", "PretrainResult", "Recipe", "ReportResult", "Round", "RunStatus", "Scores", "SelectResult",
        "StageStatus", "TextCounts", "Verification",
    ),
    "data.annotations": ("Annotation",),
    "data.loading.webdataset_reader": ("webdataset",),
    "data.sample": ("FailedSample", "Sample"),
    "errors": (
        "CapfiltError", "ClusterError", "DataError", "ImageError", "LockLostError", "ModelError", "RecipeError",
        "RunError", "ShardError", "ShortfallError", "StorageError", "TextError", "TimeLimitError", "UsageError",
    ),
    "runs.progress": ("Progress",),
}  # fmt: skip
"""Where each public name is defined."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # with it type checkers would take any name for one of this module

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
