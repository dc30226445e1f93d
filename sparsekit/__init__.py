"""sparsekit: post-training compression of Hugging Face language models."""

__version__ = "0.1.0"
