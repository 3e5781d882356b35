"""Verbs that read a recipe or a run folder and change nothing."""
