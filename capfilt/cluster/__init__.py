"""Who does the work and where: the only room that imports ray, and it knows nothing of pictures."""
