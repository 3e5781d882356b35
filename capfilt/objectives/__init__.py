"""Objectives: losses as functions of tensors, and the tasks that sum several of them in one forward pass."""
