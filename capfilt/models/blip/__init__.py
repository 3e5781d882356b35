"""BLIP: its model, transformers' config of it, and its public checkpoints."""
