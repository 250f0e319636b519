"""Which folders are packages: `adapters/` installs and imports as `moezoo.adapters`.

Another distribution owns the import name `adapters`, hence the renaming. Everything else stands in
pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["moezoo", "moezoo.*"]),
        *(f"moezoo.{name}" for name in find_packages(include=["adapters", "adapters.*"])),
    ],
    package_dir={"moezoo": "moezoo", "moezoo.adapters": "adapters"},
)
