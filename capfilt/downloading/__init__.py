"""Pairs from lists of URLs: img2dataset's downloader behind a safe, polite HTTP client, one shard at a time."""
