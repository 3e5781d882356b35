"""X-VLM: its model and its public checkpoints."""
