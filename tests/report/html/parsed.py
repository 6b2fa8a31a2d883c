"""A page in parts, by Python's own parser of HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from tpaw.report.html.page import rendered


class Parsed(HTMLParser):
    """Elements, their attributes, and the text of scripts and style sheets."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.texts = [], {}, []
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = (tag, dict(attributes)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            tag, attributes = self._inside
            self.scripts[attributes.get("id", tag)] = data
        else:
            self.texts.append(data)


def shown_responses(run, config):
    """Of each training prompt, by its id, the responses on the page of a run."""
    data = json.loads(Parsed(rendered(run, config)).scripts["samples-data"])
    return {item["id"]: item["answers"] for item in data["training"]["items"]}
