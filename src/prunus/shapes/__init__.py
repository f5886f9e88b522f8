"""Models whose blocks have sizes of their own: how a folder records them so that tools load it."""

from prunus.shapes.write import settle

__all__ = ["settle"]
