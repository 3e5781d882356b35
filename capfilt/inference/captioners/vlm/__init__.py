"""Captioners that are vision-language models of transformers, in the worker's own process."""
