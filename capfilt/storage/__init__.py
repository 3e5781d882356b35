"""Files on a folder of this machine or on any fsspec store: paths, atomic writes, safe reads."""
