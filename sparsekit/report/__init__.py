"""What a run tells about itself: the model card, a page to look at, and one line."""

from sparsekit.report.pages import pages
from sparsekit.report.summary import one_line

__all__ = ["one_line", "pages"]
