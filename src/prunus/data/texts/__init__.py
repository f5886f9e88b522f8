"""Texts that come with the package; LICENCE.md beside them says whose they are."""
