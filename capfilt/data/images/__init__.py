"""Pictures: decoded, resized as a model wants them, augmented."""
