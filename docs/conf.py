"""Settings of Sphinx for the documentation site; `docs/build_site.py` lays the sources out."""

from __future__ import annotations

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

from moezoo import __version__

project, author, release = "moezoo", "the moezoo authors", __version__
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["docs/conf.py"]

html_theme = "furo"
html_title = f"moezoo {__version__}"
html_show_sourcelink = False
html_static_path: list[str] = []

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header"]  # a page may leave a level of headings out

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "code"  # docstrings have one backtick around code
python_display_short_literal_types = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Class or instance attributes", "params_style")]


def setup(app: Sphinx) -> None:
    """A diagram is shown as its text: what would draw it is fetched from elsewhere."""
    app.add_lexer("mermaid", TextLexer)
