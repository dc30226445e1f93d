"""Updates of the kept weights: one file each, its name is the key in recipes."""
