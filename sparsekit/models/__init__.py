"""Models on disk: opened, found by structure, loaded one block at a time."""
