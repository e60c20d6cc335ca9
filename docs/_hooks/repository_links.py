"""Links between documents of the repository, as links between pages of the site.

Documents link each other by their places in the repository, so that they work there too. On the
site, a link to a document that is a page becomes a link to the page; what is no page (source,
tests) is named without a link.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def relink(markdown: str, document: str, pages: Mapping[str, str]) -> str:
    """Return the Markdown of a document with its links changed.

    Args:
        markdown: its text.
        document: its path in the repository.
        pages: the path on the site of each document that is a page, by its path in the repository.
    """
    page = pages[document]

    def change(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document), match["target"]))
        if target not in pages:
            text = match["text"]
            return text if "`" in text else f"`{text}`"
        path = posixpath.relpath(pages[target], posixpath.dirname(page) or ".")
        return f"[{match['text']}]({path}{match['anchor'] or ''})"

    return _LINK.sub(change, markdown)
