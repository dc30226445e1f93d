"""sparsekit: post-training compression of Hugging Face language models.

Importing it lets plain `from_pretrained` of transformers read packed checkpoints.
"""

from sparsekit.runtime.hook import install as _install

__version__ = "0.1.0"

_install()
