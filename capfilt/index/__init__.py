"""Nearest neighbours among vectors and hashes of images: faiss, and nothing of pictures, models or Ray."""
