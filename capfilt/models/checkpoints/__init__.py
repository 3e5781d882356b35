"""Checkpoints: where they lie, how they are read and written, what a pretraining starts from."""
