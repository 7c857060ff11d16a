"""The documentation site: Sphinx, from the Markdown beside this file and the docstrings. launch/docs.sh builds it."""

import inspect
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform

import syncbn

project = "syncbn"
author = "The syncbn developers"
project_copyright = author
release = syncbn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"syncbn {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_dark_style = "github-dark"
smartquotes_action = "D"  # dashes alone: "world" is meant as it is typed

myst_heading_anchors = 4  # those that GitHub gives headings
default_role = "literal"  # what stands in single backticks in a docstring; see PublicNames
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("ActivationLike", "M", "ProcessGroup", "Skip")}  # see api/types.md
autodoc_type_aliases["BaseCommunicator"] = "syncbn.comm.Communicator"  # what is public of it
maximum_signature_line_length = 88  # a longer one takes a line for each argument
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(torch|datetime|collections|contextlib)\..*"),  # of others, whose pages are not looked up here
    ("py:class", r"(syncbn\..*\.)?T"),  # what the function that is given to run_threads returns
]

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = {  # that include a file from elsewhere in the repository, by this file: links to it lead to the page
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "CHANGELOG.md": DOCS / "changes.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
    ROOT / "SECURITY.md": DOCS / "security.md",
    ROOT / "docker/README.md": DOCS / "containers.md",
}


def public_names() -> dict[str, str]:
    """Return by every way to write a public name, with its module and alone, the full one."""
    names: dict[str, str] = {}
    for module in (syncbn, syncbn.functional, syncbn.comm, syncbn.errors):
        for name in getattr(module, "__all__", dir(module)):
            if name[0] != "_" and not inspect.ismodule(getattr(module, name)):
                full = f"{module.__name__}.{name}"
                names |= {name: full, full.removeprefix("syncbn."): full, full: full}
    return names


class PublicNames(SphinxPostTransform):
    """Makes every public name in code type a link to its reference: in pages and docstrings alike."""

    default_priority = 5  # before references are resolved
    names = public_names()

    def run(self) -> None:
        """Put a reference around each such literal."""
        for literal in list(self.document.findall(nodes.literal)):
            full = self.names.get(literal.astext().partition("(")[0])
            if full and not isinstance(literal.parent, nodes.reference | nodes.title | pending_xref):
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=full, refexplicit=True, refwarn=True)
                link["refdoc"] = self.env.docname
                literal.replace_self(link)
                link += literal


def links_from(page: Path, source: Path, text: str) -> str:
    """Return the Markdown `text` of the file `source` with its links to files as they are from `page`."""

    def link(match: re.Match[str]) -> str:
        file = (source.parent / match[1]).resolve()
        return f"]({os.path.relpath(PAGES.get(file, file), page.parent)}" if file.exists() else match[0]

    return re.sub(r"\]\(([^)#\s]+)", link, text)


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let the links of a page lead to pages."""
    page = DOCS / f"{docname}.md"
    source[0] = links_from(page, page, source[0])


def include(app: Sphinx, file: Path, docname: str, source: list[str]) -> None:
    """Let the links of an included file lead to where they led from its own place."""
    source[0] = links_from(DOCS / f"{docname}.md", DOCS / file, source[0])


def find(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.reference | None:
    """Look for a type in a signature among all names: before Sphinx 8.2 those of api/types.md are not found as such."""
    arguments = (env, node["refdoc"], app.builder, "obj", node["reftarget"], node, text)
    return env.get_domain("py").resolve_xref(*arguments) if node.get("reftype") == "class" else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_post_transform(PublicNames)
    app.connect("source-read", read)
    app.connect("include-read", include)
    app.connect("missing-reference", find)
