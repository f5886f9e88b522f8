"""`prunus export`: find the model, write beside, check, rename."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError, near
from prunus.formats import FORMATS, Format, Settings
from prunus.models.source import locate
from prunus.progress import Progress, Silent


def export(
    model: str | Path,
    out: str | Path,
    format: str,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model` in another form to `out`, which appears only when it is whole and was checked.

    Args:
        model: a folder, a hub id, a .gguf file or an alias.
        out: a new folder, or a new file where the format is one file.
        format: a row of `FORMATS`.
        settings: see `Settings`.
        overwrite: replace `out` once the new one is complete.
        progress: told about the stages.

    Returns:
        What `prunus export --json` prints.

    Raises:
        PrunusError: an unknown format, an option that the format does not take, a model that it cannot carry.
    """
    settings, progress = settings or Settings(), progress or Silent()
    kind = _format(format, settings)
    source = locate(model, trust_remote_code=settings.trust_remote_code)
    target = Path(out).expanduser().resolve()  # what a link names, not the link
    _check_place(target, source, kind, overwrite)
    begun = time.monotonic()
    progress.stage("export", 1)
    partial = target.with_name(f".{target.name}.prunus-export")
    _remove(partial)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = kind.write(source, partial, settings)
        size = sum(path.stat().st_size for path in [partial, *partial.rglob("*")] if path.is_file())
        _replace(partial, target)
    finally:
        _remove(partial)
        progress.close()
    progress.advance(f"written to {target}")
    return {
        "model": str(model), "out": str(target), "format": format, "bytes": size,
        "seconds": time.monotonic() - begun, **found,
    }  # fmt: skip


def _format(name: str, settings: Settings) -> Format:
    if name not in FORMATS:
        raise RecipeError(f"There is no format {name!r}.{near(name, FORMATS)}")
    kind = FORMATS[name]
    if settings.portable and not kind.portable:
        others = ", ".join(sorted(other for other, row in FORMATS.items() if row.portable))
        raise RecipeError(f"--portable means nothing to --format {name}; it belongs to {others}.")
    if settings.type is not None and settings.type not in kind.types:
        known = (
            f"It writes: {', '.join(kind.types)}." if kind.types else "It keeps the stored numbers; leave --type out."
        )
        raise RecipeError(f"--format {name} cannot write --type {settings.type!r}. {known}")
    return kind


def _check_place(target: Path, source: Path, kind: Format, overwrite: bool) -> None:
    """See that OUT may be written.

    Raises:
        RecipeError: it exists, is of the wrong kind, or lies inside the model.
    """
    from prunus.job import check_out

    if kind.suffix is None:
        check_out(target, source, overwrite)
        return
    if target.suffix != kind.suffix:
        raise RecipeError(
            f"OUT {target} shall be one file that ends with {kind.suffix}, such as {target}{kind.suffix}."
        )
    if target.is_dir():
        raise RecipeError(f"OUT {target} is a folder; choose another name.")
    if target.exists() and not overwrite:
        raise RecipeError(f"OUT {target} exists. Choose another name, or add --overwrite to replace it.")


def _replace(partial: Path, target: Path) -> None:
    """Let the finished result take its place; an old one is removed only once the new one stands there."""
    if not target.is_dir():
        partial.replace(target)
        return
    old = target.with_name(f".{target.name}.prunus-old")
    _remove(old)
    target.replace(old)
    try:
        partial.replace(target)
    except OSError:
        old.replace(target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
