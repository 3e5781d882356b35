"""estimate: the real stages on a seeded sample, and from it what the whole will take, keep and cost."""
