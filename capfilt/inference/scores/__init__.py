"""Scores beside itm and itc: what `capfilt annotate --scores` and `--add-score` compute."""
