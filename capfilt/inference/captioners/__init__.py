"""The captioner's role, played by a local model."""
