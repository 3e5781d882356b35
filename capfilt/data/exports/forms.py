"""The formats by their names."""

from __future__ import annotations

from capfilt.data.exports import NAMES
from capfilt.data.exports.form import Form
from capfilt.data.exports.listed import BLIP, CSV, LLAVA
from capfilt.data.exports.tables import COYO, HF, LAION_COCO, PARQUET
from capfilt.data.exports.tars import WEBDATASET
from capfilt.data.exports.uids import DATACOMP

_FORMS = (WEBDATASET, PARQUET, HF, COYO, LAION_COCO, BLIP, DATACOMP, LLAVA, CSV)
FORMS: dict[str, Form] = dict(zip(NAMES, _FORMS, strict=True))
