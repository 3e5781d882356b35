"""VLMo: its model and its public checkpoints."""
