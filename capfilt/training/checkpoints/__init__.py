"""States of a training: what they hold, and how they lie on disk or a store."""
