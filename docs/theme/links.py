"""What mkdocs does beside building docs/: it takes in what pages link to elsewhere in the repository.

A page of docs/ lies at the root of the site, everything else where it lies in the repository. Links are written as
GitHub follows them, and are turned into those of the site here. Folders of code are not on the site: of a link to one,
the words stay.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOORS = ("README.md", "CONTRIBUTING.md")  # pages that no page of docs/ needs to link to
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
OUTWARD = re.compile(r"[a-z]+:|#|//")


def target(link: str, page: str) -> tuple[str, str]:
    """The path in the repository that a link of a page there leads to, and its anchor with the `#`."""
    path, sharp, anchor = link.partition("#")
    return os.path.normpath(PurePosixPath(page).parent / path), sharp + anchor


def links(page: str) -> list[str]:
    """The paths in the repository that a page there links to."""
    found = (link for _, link in LINK.findall((ROOT / page).read_text()))
    return [target(link, page)[0] for link in found if not OUTWARD.match(link)]


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site's sources. A folder stands for its README."""
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    return path.removeprefix("docs/")


def on_files(files: Files, config) -> Files:
    """Add the files that pages link to, and those that these link to in turn."""
    wanted = [*DOORS, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    known = {file.src_uri for file in files}
    seen = set()
    while wanted:
        path = wanted.pop()
        source = ROOT / path
        if source.is_dir():
            path, source = f"{path}/README.md", source / "README.md"
        if path in seen or not source.is_file():  # a link to what is not there is the strict build's to report
            continue
        seen.add(path)
        if place_of(path) not in known:
            files.append(File.generated(config, place_of(path), abs_src_path=str(source)))
        if source.suffix == ".md":
            wanted += links(path)
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """A page's text with the links of the site. What experiments wrote is found after what explains it: their tables
    have the words of a question many times."""
    here = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    if here.startswith("experiments/"):
        page.meta.setdefault("search", {"boost": 0.1})

    def replaced(match: re.Match) -> str:
        words, link = match.groups()
        if OUTWARD.match(link):
            return match[0]
        path, anchor = target(link, here)
        if (ROOT / path).is_dir() and not (ROOT / path / "README.md").is_file():
            return words
        to = os.path.relpath(place_of(path), PurePosixPath(page.file.src_uri).parent)
        return f"[{words}]({to}{anchor})"

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, page, config, files: Files) -> str:
    """A page with each picture a link to itself: on a telephone, that is how its letters can be read. Code of a whole
    line is marked, since in a table it may break at its spaces, which names of options may not."""
    html = re.sub(r"<code>(?=[^<]{36})", '<code class="long">', html)
    return re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)
