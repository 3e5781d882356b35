"""ALBEF: its model and its public checkpoints."""
