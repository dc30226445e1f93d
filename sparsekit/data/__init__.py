"""Text to blocks of tokens."""

from sparsekit.data.blocks import DEFAULT_SEQUENCE_LENGTH, load_blocks
from sparsekit.data.documents import Part, TextSpec
from sparsekit.data.own_text import SOURCE as OWN_TEXT
from sparsekit.data.own_text import write_blocks
from sparsekit.data.packing import TokenBlocks

__all__ = ["DEFAULT_SEQUENCE_LENGTH", "OWN_TEXT", "Part", "TextSpec", "TokenBlocks", "load_blocks", "write_blocks"]
