"""What MkDocs does not know of this repository: its changelog is a page, and pages link to files beside docs/.

Such a link is checked. Of a picture the site gets a copy; every other file is named in place of the link, since a site
has no files of the repository. On a Git host the same links work as they are.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PICTURES = (".png", ".svg")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")


def on_files(files, config):
    """The changelog, and every picture that a page shows from elsewhere."""
    text = in_docs((ROOT / "CHANGELOG.md").read_text())
    files.append(File.generated(config, "changelog.md", content=text))
    for page in list(files.documentation_pages()):
        for target in outside(page.content_string, page.src_uri):
            if target.endswith(PICTURES) and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def in_docs(text):
    """A page of the root as one of docs/."""

    def link(match):
        target = match["target"]
        moved = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        return match[0] if is_elsewhere(target) else f"{match['mark']}[{match['text']}]({moved})"

    return outside_of_fences(text, lambda part: LINK.sub(link, part))


def is_elsewhere(target):
    return target.startswith("#") or "://" in target or target.startswith("mailto:")


def path_of(target, page):
    """The path in the repository of a file that a page links to; None of what lies in docs/, or is no file of ours."""
    if is_elsewhere(target):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target.partition("#")[0]))
    return None if path.startswith("docs/") else path


def outside(text, page):
    """The files beside docs/ that a page links to."""
    found = [path_of(match["target"], page) for match in LINK.finditer(FENCE.sub("", text))]
    return [path for path in found if path is not None]


def outside_of_fences(text, change):
    """A page with something changed in it, but not in its code."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def on_page_markdown(markdown, page, config, files):
    """Links to files beside docs/, and the room of a list of pages for a page that is the only one of its tab."""
    here = page.file.src_uri
    if page.parent is None:
        page.meta["hide"] = ["navigation"]

    def link(match):
        path = path_of(match["target"], here)
        if path is None:
            return match[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{here} links to {match['target']}, and the repository has no {path}")
        if path.endswith(PICTURES):
            return f"{match['mark']}[{match['text']}]({os.path.relpath(path, posixpath.dirname(here) or '.')})"
        return match["text"] if path in match["text"] else f"{match['text']} (`{path}`)"

    return outside_of_fences(markdown, lambda part: LINK.sub(link, part))
