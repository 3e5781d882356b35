"""The formats of other tools that data are written in: what `capfilt export DATA --as FORM` can be.

Each format is written by a function that pulls the samples of one part through it and returns the files of that part;
what one file must hold of all parts is put together at the end.
"""

from __future__ import annotations

from capfilt.data.exports.form import Form, Part
from capfilt.data.exports.listed import BLIP, CSV, LLAVA
from capfilt.data.exports.tables import COYO, HF, LAION_COCO, PARQUET
from capfilt.data.exports.tars import WEBDATASET
from capfilt.data.exports.uids import DATACOMP

FORMS: dict[str, Form] = {
    "webdataset": WEBDATASET,
    "parquet": PARQUET,
    "hf-dataset": HF,
    "coyo": COYO,
    "laion-coco": LAION_COCO,
    "blip-json": BLIP,
    "datacomp-npy": DATACOMP,
    "llava-json": LLAVA,
    "open-clip-csv": CSV,
}

__all__ = ["FORMS", "Form", "Part"]
