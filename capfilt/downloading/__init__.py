"""Pairs from URL lists: img2dataset's downloader behind a fence, one shard at a time."""
