"""Help pages in plain text: options in named sections, with their units, and examples at the end."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Page(TyperCommand):
    """A command's help: arguments, options by section, examples. Plain text needs no rich, so it is quick."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each section's rows; `rich_help_panel` names the section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if not getattr(param, "hidden", False):
                default = "Arguments" if param.param_type_name == "argument" else "This run"
                section = getattr(param, "rich_help_panel", None) or default
                sections.setdefault(section, []).append((_name(param), getattr(param, "help", None) or ""))
        # Lines up all sections alike.
        width = max(len(name) for rows in sections.values() for name, _ in rows)
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=width)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """`prunus prune [OPTIONS] [MODEL] [OUT]`."""
        pieces = [_name(param) for param in self.get_params(ctx) if param.param_type_name == "argument"]
        formatter.write_usage(ctx.command_path, " ".join([*pieces, "[OPTIONS]"]))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they stand."""
        _examples(self.epilog, formatter)


class Pages(TyperGroup):
    """The first page: what there is, in the order of use, and the examples as they stand."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the table."""
        return list(self.commands)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they stand."""
        _examples(self.epilog, formatter)


def _name(param: Any) -> str:
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper()
    return ", ".join(param.opts) + (f" {param.metavar}" if param.metavar and not param.is_flag else "")


def _examples(text: str | None, formatter: Any) -> None:
    if text:
        formatter.write_paragraph()
        formatter.write("Examples:\n")
        for line in text.strip().splitlines():
            formatter.write(f"  {line}\n")
