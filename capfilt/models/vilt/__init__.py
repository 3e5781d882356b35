"""ViLT: its model, transformers' classes of it, and its own checkpoints."""
