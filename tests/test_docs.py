"""The site builds without a warning, its reference is complete, its links lead somewhere, and its first script runs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from conftest import ROOT, run_job

import syncbn

DOCS = ROOT / "docs"
MODULES = (syncbn, syncbn.functional, syncbn.comm, syncbn.errors)

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(not (DOCS / "conf.py").exists(), reason="no docs/ beside these tests: they are not in a clone"),
]
needs_sphinx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "furo", "myst_parser"))),
    reason="the packages of the site are missing: pip install '.[docs]'",
)


def build(source: Path, output: Path) -> tuple[int, str]:
    """Build as launch/docs.sh does; return the status and what was printed."""
    options = ["-W", "--keep-going", "-q", "-d", str(output / "trees")]
    job = run_job([sys.executable, "-m", "sphinx", *options, str(source), str(output / "site")], seconds=180)
    return job.returncode, job.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("docs")
    status, printed = build(DOCS, output)
    assert status == 0, printed
    return output / "site"


BROKEN = """# Page

[a file](nowhere.md), [an anchor](#nothing), {py:func}`syncbn.nothing`

```{eval-rst}
.. autofunction:: syncbn.missing
```
"""


@needs_sphinx
def test_what_is_wrong_in_a_page_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(DOCS)!r})\nfrom conf import *\nhtml_static_path = []"
    )
    (tmp_path / "index.md").write_text(BROKEN)
    status, printed = build(tmp_path, tmp_path)
    assert status != 0
    for wrong in ("nowhere.md", "nothing", "syncbn.nothing", "missing"):
        assert wrong in printed


# ---- the reference


def public_names() -> set[str]:
    """Return every public name of the public modules, in full."""
    return {
        f"{module.__name__}.{name}"
        for module in MODULES
        for name in getattr(module, "__all__", vars(module))
        if not name.startswith("_") and not inspect.ismodule(getattr(module, name))
    }


def missing(site: Path, names: set[str]) -> set[str]:
    """Return those names of which no page of the reference has an entry."""
    return names - {anchor for file in (site / "api").glob("*.html") for anchor in html(file).anchors}


@needs_sphinx
def test_every_public_name_has_an_entry(site: Path) -> None:
    names = public_names()
    assert {"syncbn.init", "syncbn.comm.MPI", "syncbn.errors.InputError", "syncbn.functional.sync_batch_norm"} < names
    assert missing(site, names) == set()
    assert missing(site, {*names, "syncbn.nothing"}) == {"syncbn.nothing"}


@needs_sphinx
def test_public_names_in_code_type_lead_to_their_entries(site: Path) -> None:
    assert "api/training.html#syncbn.init" in html(site / "hangs.html").links  # in a page
    assert "#syncbn.init" in html(site / "api/training.html").links  # in a docstring
    assert "types.html#ProcessGroup" in html(site / "api/layer.html").links  # in a signature


# ---- links


class Page(NamedTuple):
    """The links of a page, and the places in it that can be linked to."""

    links: set[str]
    anchors: set[str]


def html(file: Path) -> Page:
    """Return what is in a page of the site."""
    page = Page(set(), set())

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            page.links.update(value for key, value in attrs if key in ("href", "src") and value)
            page.anchors.update(value for key, value in attrs if key == "id" and value)

    Parser().feed(file.read_text())
    return page


def markdown(file: Path) -> Page:
    """Return what is in a text as GitHub shows it, with the anchors that it gives headings."""
    text = re.sub(r"^ *```.*?^ *```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
    return Page(set(re.findall(r"\]\(([^)\s]+)\)", text)), slugs)


def dead_links(files: list[Path], read: Callable[[Path], Page]) -> list[str]:
    """Return the links to files and anchors that are not there."""
    pages = {file.resolve(): read(file) for file in files}
    dead = []
    for file, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):  # elsewhere: there is no network
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (file.parent / path.partition("?")[0]).resolve() if path else file
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{file.name}: {link}")
    return sorted(dead)


@needs_sphinx
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    assert dead_links(list(site.rglob("*.html")), html) == []


def test_every_link_of_a_text_leads_somewhere() -> None:
    folders = (ROOT, DOCS, DOCS / "api", ROOT / "docker")
    assert dead_links([file for folder in folders for file in folder.glob("*.md")], markdown) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="#top"></a><a href="#no"></a><img src="no.png">')
    (tmp_path / "b.html").write_text(
        '<a href="a.html#top"></a><a href="a.html#no"></a><a href="https://example.org"></a>'
    )
    assert dead_links(sorted(tmp_path.glob("*.html")), html) == ["a.html: #no", "a.html: no.png", "b.html: a.html#no"]
    (tmp_path / "a.md").write_text("# `One`, two\n[here](#one-two) [no](#one) [no](no.md)\n```\n[code](no.txt)\n```\n")
    assert dead_links([tmp_path / "a.md"], markdown) == ["a.md: #one", "a.md: no.md"]


# ---- docs/start.md


@pytest.mark.launcher
def test_the_first_script_prints_what_the_page_says(tmp_path: Path) -> None:
    page = (DOCS / "start.md").read_text()
    (script,) = re.findall(r"^```python\n(import torch\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    job = run_job([*torchrun, str(tmp_path / "train.py")], seconds=120)
    (promised,) = set(re.findall(r"processes: (loss [\d.]+)$", page, re.MULTILINE))  # the same for every number of them
    assert f"3 processes: {promised}" in job.stdout.splitlines(), job.stdout
