"""Texts that come with the package; LICENSE.md beside them says whose they are."""
