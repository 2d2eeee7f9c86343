"""Progress bars of other packages."""

import sys

from transformers.utils.logging import disable_progress_bar


def no_bars_in_files() -> None:
    """Turns the bars of Hugging Face's packages off, unless they are drawn on a terminal.

    A bar that is drawn again and again makes a log file hard to read.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
