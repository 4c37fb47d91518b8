"""HTML that escapes what it is given, and the page on which a report stands."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

# Tags that have no end.
VOID = {"img", "meta", "rect", "line", "circle"}
STYLE = Path(__file__).with_name("report_style.css")


class Html(str):
    """Text that is HTML already; any other text is escaped where it is put into an element."""


def element(tag: str, /, *children: object, **attributes: object) -> Html:
    """Return an element.

    Args:
        tag: Its name.
        children: What stands in it: `Html` as it is, anything else as text.
        attributes: ``class_`` for the class, and an underscore for each hyphen; one that is None
            is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Html(f"<{tag}{given}>" if tag in ("img", "meta") else f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{join(*children)}</{tag}>")


def join(*parts: object) -> Html:
    return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts))


def table(
    heads: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    caption: object | None = None,
    marks: Mapping[int, str] | None = None,
) -> Html:
    """Return a table whose first column names what a row is about.

    Args:
        heads: Of the columns.
        rows: Cells, as many as there are heads.
        caption: What the table says.
        marks: A class for rows, by their index.
    """
    body = []
    for index, (first, *others) in enumerate(rows):
        cells = [element("th", first, scope="row"), *(element("td", cell) for cell in others)]
        body.append(element("tr", *cells, class_=(marks or {}).get(index)))
    parts = [] if caption is None else [element("caption", caption)]
    head = element("tr", *(element("th", text, scope="col") for text in heads))
    parts += [element("thead", head), element("tbody", *body)]
    return element("div", element("table", *parts), class_="wide")


def details(summary: str, *children: object) -> Html:
    """Return what is shown when its summary is clicked."""
    return element("details", element("summary", summary), *children)


def code(text: str) -> Html:
    return element("pre", element("code", text))


def picture(path: Path, what: str) -> Html:
    """Return a PNG file as part of the page itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = element("img", src=f"data:image/png;base64,{data}", alt=what)
    return element("figure", image, element("figcaption", what))


def page(title: str, lead: object, sections: Sequence[tuple[str, object]]) -> str:
    """Return a whole page: a title, what it is, links to its sections, and these.

    Nothing is loaded from elsewhere, and there is no script.

    Args:
        title: Of the page.
        lead: Below the title.
        sections: Headings and what stands under them.
    """
    links = [
        element("li", element("a", heading, href=f"#part-{index}"))
        for index, (heading, _) in enumerate(sections)
    ]
    parts = [
        element("section", element("h2", heading), body, id=f"part-{index}")
        for index, (heading, body) in enumerate(sections)
    ]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        # Style sheets know no character references.
        element("style", Html(STYLE.read_text())),
    ]
    header = element("header", element("h1", title), lead, element("nav", element("ul", *links)))
    body = element("body", header, element("main", *parts))
    return f"<!doctype html>\n{element('html', element('head', *head), body, lang='en')}\n"
