"""Refiners of masks: one file each, its name is the key in recipes."""
