"""Scores beside itm and itc: what `capfilt annotate --scores` and `--add-score` compute, each into a table of its own."""
