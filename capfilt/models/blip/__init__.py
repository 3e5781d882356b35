"""BLIP: its model, transformers' config of it, and the key maps of its public checkpoints."""
