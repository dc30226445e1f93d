"""Generation in which a cheap version of a model drafts tokens and the model itself verifies them."""
