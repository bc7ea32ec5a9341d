"""Pages as a reader, and a browser, takes them; and text that would like to be code."""

from html.parser import HTMLParser

HOSTILE = "</script><script>alert(1)</script><img src=http://evil/x onerror=alert(1)> $body &lt;"


class Page(HTMLParser):
    """Tags with their attributes, and text: what a reader sees, the styles, data by its name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.styles = ""
        self.data: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attrs = self.tags[-1] if self.tags else ("", {})
        if self.cdata_elem is None:
            self.text += data
        elif tag == "style":
            self.styles += data
        elif id := attrs.get("id"):
            name = id.removeprefix("data-")
            self.data[name] = self.data.get(name, "") + data
