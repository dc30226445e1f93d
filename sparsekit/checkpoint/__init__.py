"""Checkpoints on disk: bytes, shards, integrity, staging. No torch."""
