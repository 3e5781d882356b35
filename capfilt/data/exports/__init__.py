"""The formats of other tools that data are written in: what `capfilt export DATA --as FORM` can be.

Each is written by a function that pulls the samples of one part through it and returns the files of that part; what
must be one file for all of the data is put together at the end.
"""

from __future__ import annotations

NAMES = (
    *("webdataset", "parquet", "hf-dataset", "coyo", "laion-coco"),
    *("blip-json", "datacomp-npy", "llava-json", "open-clip-csv"),
)
