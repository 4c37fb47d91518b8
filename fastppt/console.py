"""What a terminal or a log file is told: nothing that outside text could do to it, no secrets.

File names, captions, prompts and the metadata of files are other people's text.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 and C1 controls but for tab and line feed; marks that turn the direction of writing; halves of
# surrogate pairs, as which Python keeps the bytes of a file name that is not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Tokens of the hub, and what stands for a login in a URL or a header.
SECRETS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}|(?<=://)[^/\s@]+(?=@)"
    r"|(?<=[?&]token=)[^&\s]+|(?<=Bearer )\S+"
)
# Where huggingface_hub looks for a token.
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
HIDDEN = "[hidden]"


def printable(text: str) -> str:
    r"""Return the text with what a terminal would obey, or could not show, as escapes: ``\x1b``."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def scrub(text: str) -> str:
    """Return the text without tokens of the hub and without logins in URLs."""
    for variable in SECRET_VARIABLES:
        if secret := os.environ.get(variable, "").strip():
            text = text.replace(secret, HIDDEN)
    return SECRETS.sub(HIDDEN, text)


class SafeConsole(Console):
    """A console that shows control characters as escapes and hides secrets.

    A reader who goes away (``fastppt train | head``) does not end a run. Nothing is highlighted:
    that takes rich time that grows with the square of a word's length.

    Args:
        **options: Of rich's console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does; what is not rich's own control code is made safe."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(scrub(segment.text)), segment.style)

    def on_broken_pipe(self) -> None:
        """Say no more."""
        self.quiet = True
        silence(sys.stderr if self.stderr else sys.stdout)


class SafeFormatter(logging.Formatter):
    """Formats log records as `SafeConsole` shows text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        return printable(scrub(super().format(record)))


def silence(stream: object) -> None:
    """Lead a standard stream whose reader has gone to nowhere.

    Args:
        stream: `sys.stdout` or `sys.stderr`.
    """
    number = 2 if stream is sys.stderr else 1
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
