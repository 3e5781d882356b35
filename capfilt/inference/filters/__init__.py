"""The filter's role, played by a local model."""
