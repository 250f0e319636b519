"""What pyproject.toml cannot say: where `moezoo.adapters` lies, and the README for an index.

`adapters/` stands at the top of the repository and `moezoo/adapters` is a link to it, so that an
editable install is one folder on the path, which type checkers see. A system that checks out no
links gets the same packages by renaming.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def packages() -> dict[str, object]:
    """The packages and where they lie."""
    if (ROOT / "moezoo" / "adapters").is_dir():
        found = find_packages(include=["moezoo", "moezoo.*"])
        return {"packages": found, "package_dir": {"": "."}}
    beside = find_packages(include=["adapters", "adapters.*"])
    return {
        "packages": [*find_packages(include=["moezoo", "moezoo.*"])]
        + [f"moezoo.{name}" for name in beside],
        "package_dir": {"moezoo": "moezoo", "moezoo.adapters": "adapters"},
    }


def long_description() -> str:
    """The README without links and pictures that lead into the repository: an index has none."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?![a-z]+:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?![a-z]+:)[^)]*\)", r"\1", text)


setup(
    **packages(),
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
