"""Pipelines made of stages: a verb of the command line is one module or folder here."""
