"""The site: it builds strictly, no link is dead, nothing comes from another host, and Markdown reads the same.

CommonMark, which GitHub follows, is the oracle: a page of the site has as many list items, table rows, code blocks and
pictures as it finds in the same text.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser
import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

import sit_atconv
from sit_atconv import swap

pytest.importorskip("material", reason="the extra `docs` is not installed")

COUNTED = {"li", "tr", "pre", "img", "h2", "h3"}


class Page(HTMLParser):
    """A built page: its anchors, its links, what it fetches by itself, and the elements of its article."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.fetched, self.elements = set(), [], [], Counter()
        self.inside = self.hidden = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.inside += tag == "article"
        if self.inside and tag in COUNTED:
            self.elements[tag] += 1
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link":
            (self.links if given["rel"] in ("canonical", "next", "prev") else self.fetched).append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])

    def handle_endtag(self, tag):
        self.inside -= tag == "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def place(link: str, page: str) -> tuple[str, str]:
    """The file of the site that a link of a page leads to, and the anchor in it."""
    parts = urlsplit(link)
    path = os.path.normpath(Path(page).parent / unquote(parts.path)) if parts.path else page
    return path, unquote(parts.fragment)


def test_every_link_and_anchor_leads_somewhere(site, pages):
    assert len(pages) > 30
    dead, followed = [], 0
    for name, page in pages.items():
        for link in [*page.links, *page.fetched]:
            if urlsplit(link).scheme in ("http", "https", "mailto", "data") or (name == "404.html"):
                continue  # of the page for lost visitors, links are from the root of a server
            path, anchor = place(link, name)
            path = f"{path}/index.html".removeprefix("./") if (site / path).is_dir() else path
            followed += 1
            if not (site / path).is_file() or (anchor and path in pages and anchor not in pages[path].anchors):
                dead.append((name, link))
    assert not dead
    assert followed > 1000


def test_nothing_comes_from_another_host(site, pages):
    fetched = {link for page in pages.values() for link in page.fetched}
    assert any(link.endswith(".js") for link in fetched)
    assert any(link.endswith(".css") for link in fetched)
    assert not [link for link in fetched if urlsplit(link).netloc]
    outward = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//")
    assert not [path.name for path in site.rglob("*.css") if outward.search(path.read_text())]


def source_of(page: str) -> Path | None:
    """The Markdown of a built page."""
    path = "README.md" if page == "index.html" else page.replace("index.html", "README.md").replace(".html", ".md")
    return next((root / path for root in (ROOT / "docs", ROOT) if (root / path).is_file()), None)


def test_pages_have_the_elements_that_their_markdown_has(pages):
    compared = 0
    for name, page in pages.items():
        source = source_of(name)
        if source is None or name == "api.html":  # made of docstrings
            continue
        html = MarkdownIt("commonmark").enable("table").render(source.read_text())
        wanted = Counter(tag for tag in re.findall(r"<(\w+)", html) if tag in COUNTED)
        assert page.elements == wanted, name
        compared += 1
    assert compared > 30


def test_every_page_is_searched(site, pages):
    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert {entry["location"].partition("#")[0] for entry in entries} == pages.keys() - {"404.html"}
    found = [entry["location"] for entry in entries if "lateral inhibition" in entry["text"].lower()]
    assert any(location.startswith("how_it_works.html") for location in found)


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(site):
    """Where the site is served: its search does not work from the disk."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_browser_shows_pages_that_fit_follow_its_colours_and_are_found(address, pages, tmp_path):
    if browser.program() is None:
        pytest.skip(f"none of {', '.join(browser.PROGRAMS)} is installed")
    seen = "document.readyState == 'complete' && location.pathname == "
    with browser.browsing(tmp_path / "browser") as page:
        for scheme, dark in (("light", False), ("dark", True), ("light", False)):  # the first visit decides nothing
            page.open("about:blank")
            page.open(f"{address}/start.html", scheme=scheme)
            colour = page.until(f"{seen}'/start.html' && getComputedStyle(document.body).backgroundColor")
            assert (int(re.search(r"\d+", colour)[0]) < 100) == dark, scheme
        for name in sorted(pages.keys() - {"404.html"}):
            page.open(f"{address}/{name}", width=390)
            # Wide tables and code scroll within themselves.
            page.until(f"{seen}'/{name}'")
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), name
        page.open(f"{address}/index.html")
        page.until("!!document.querySelector('.md-search__input')")
        page.run(
            "(field => { field.focus(); field.value = 'lateral inhibition';"
            " field.dispatchEvent(new Event('keyup', {bubbles: true})); })(document.querySelector('.md-search__input'))"
        )
        page.until(
            "[...document.querySelectorAll('.md-search-result__link')].some(a => a.href.includes('how_it_works'))"
        )
        assert {urlsplit(each).hostname for each in page.requested if each.startswith("http")} == {"127.0.0.1"}


def test_the_reference_has_what_the_library_exports(site, pages):
    page = (site / "api.html").read_text()
    names = {*sit_atconv.__all__} - {"__version__"}
    assert {name for name in names if f"sit_atconv.{name}" not in pages["api.html"].anchors} == set()
    functions = {name for name in swap.__all__ if not name[0].isupper() and not name.endswith("_grid")}
    functions -= {"swap_attention"}
    assert {name for name in functions if f"sit_atconv.swap.{name}" not in pages["api.html"].anchors} == set()
    asked = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(asked) == len(set(asked))
    for name in asked:
        entry = page.split(f'id="{name}"')[1].split('class="doc doc-object ')[0]
        assert "<p>" in entry, f"{name} has no docstring"


def test_parameters_of_a_docstring_become_a_list():
    theme = runpy.run_path(str(ROOT / "docs/theme/docstrings.py"))
    text = """Gives what it is given. See: nothing.

    y = f(x)

x: tokens (B, N, C), with
their grid. size: how
    many. Both, Or None.
one, other: switches.
Raises InputError: for
both."""
    wanted = """Gives what it is given. See: nothing.

    y = f(x)


- **x**: tokens (B, N, C), with
    their grid. size: how
    many. Both, Or None.
- **one, other**: switches.

Raises InputError: for
both."""
    assert theme["as_markdown"](text) == wanted


def test_pictures_of_the_docs_are_shown_and_small():
    shown = {
        (page.parent / link).resolve()
        for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())
    }
    pictures = {*ROOT.glob("docs/*.png"), *ROOT.glob("docs/pictures/*")}
    assert pictures
    assert pictures <= shown
    assert all(path.stat().st_size < 400_000 for path in pictures)
