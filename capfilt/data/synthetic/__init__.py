"""The embedded world: pictures and texts drawn from a seed, so that everything runs offline."""
