"""Seeded bugs: each is a line changed in a copy of the package, and some property must fail."""
