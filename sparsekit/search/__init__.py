"""Search over layers: discrete levels of every linear, where they are stored, and the evolution that chooses them."""
