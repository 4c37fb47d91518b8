"""The README's tables as HTML: the little of Markdown that they are written in.

That is paragraphs, tables, **strong**, *emphasis* and `code`; anything else stays as it is written.
"""

import re

from bench.report_html import Html, element, join, table

INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*")
TAGS = ("code", "strong", "em")


def render(markdown: str) -> Html:
    """Return HTML of blocks that an empty line parts."""
    blocks = [block for block in re.split(r"\n\s*\n", markdown.strip()) if block.strip()]
    return join(*map(_block, blocks))


def render_inline(text: str) -> Html:
    """Return HTML of one line."""
    parts: list[object] = []
    end = 0
    for found in INLINE.finditer(text):
        tag, inner = next(
            (tag, inner) for tag, inner in zip(TAGS, found.groups(), strict=True) if inner
        )
        parts += [text[end : found.start()], element(tag, inner)]
        end = found.end()
    return join(*parts, text[end:])


def _block(block: str) -> Html:
    lines = block.strip().splitlines()
    if not lines[0].startswith("|"):
        return element("p", render_inline(" ".join(lines)))
    head, _, *rows = ([render_inline(cell) for cell in _cells(line)] for line in lines)
    return table(head, rows)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
