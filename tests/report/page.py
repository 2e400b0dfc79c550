"""What a page's HTML and CSS say, without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "rect", "circle"}


class Page(HTMLParser):
    """A parsed page: `elements` as (tag, attributes, tags around it), its ids, and tags that were closed wrongly."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.ids, self.wrong, self._open = [], [], [], []
        self.feed(html)
        self.wrong += self._open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes, tuple(self._open)))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self._open)))

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()
        else:
            self.wrong.append(tag)

    def all(self, tag: str) -> list[dict]:
        """Attributes of every element of this tag."""
        return [attributes for name, attributes, _ in self.elements if name == tag]


def themes(css: str) -> dict[str, dict[str, str]]:
    """The custom properties of the light and the dark theme."""
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return {name: dict(re.findall(r"--(\w+): (#\w{6})", text)) for name, text in (("light", light), ("dark", dark))}


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours #rrggbb, from 1 to 21."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
