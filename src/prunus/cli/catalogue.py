"""`prunus methods` and `prunus schema`: what there is to choose from."""

from __future__ import annotations

from prunus.cli.options import Json
from prunus.cli.session import show, working

EXAMPLES = {
    "methods": """
prunus methods
prunus methods --json
""",
    "schema": """
prunus schema > recipe.schema.json
""",
}


def methods(as_json: Json = False) -> None:
    """List every method, metric, update, pattern and allocation, with its paper and what it needs.

    A method is a metric, a pattern and an update together; each part can be replaced by its own
    option of `prunus prune`, and any allocation goes with any method.
    """
    with working(quiet=True):
        from prunus import report
        from prunus.methods.catalogue import rows

        result = {"methods": rows()}
    show(result, report.methods_text, as_json=as_json)


def schema() -> None:
    """Print the JSON schema of recipes, for editors and for checking them by machine."""
    with working(quiet=True):
        from prunus.recipe import schema as recipe_schema

        result = recipe_schema()
    import json

    show(result, lambda found: json.dumps(found, indent=2), as_json=False)
