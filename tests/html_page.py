"""A page of a report as its elements, texts, tables and pictures."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"img", "meta", "wbr"}


class Page(HTMLParser):
    """A page as elements (tag, attributes) and the text of each; fails for tags that do not close."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.source, self.elements, self.texts, self.open = text, [], [], []
        self.rows, self.broken = [], False  # rows of all tables, of their cells' texts; whether a <wbr> came last
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self.broken = name == "wbr"
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name
        self.broken = False

    def handle_data(self, data):
        if "style" not in self.open:
            if self.broken:
                self.texts[-1] += data
            else:
                self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, name):
        return [attributes for each, attributes in self.elements if each == name]

    def row(self, first):
        """The cells beside the only row heading that begins with `first`."""
        (found,) = [row[1:] for row in self.rows if row and row[0].startswith(first)]
        return found


def picture(element):
    kind, data = element["src"].split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))
