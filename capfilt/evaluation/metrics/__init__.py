"""Measures as pure functions of arrays and strings."""
