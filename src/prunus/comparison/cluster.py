"""Rows of a comparison on a Ray cluster: one task a row, as many at a time as the cluster has room for."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunus.comparison.row import Order, failed, make
from prunus.comparison.shared import Shared
from prunus.errors import RecipeError
from prunus.progress import Progress, Silent

INSTALL = "pip install 'prunus[ray]'"


def make_all(orders: Sequence[Order], address: str, progress: Progress) -> dict[str, dict[str, Any]]:
    """Make rows on the cluster at `address`.

    Every machine of it must see the comparison's folder, the models and the texts under the same paths, and have
    prunus installed. A row that dies with its machine is tried once more elsewhere; it goes on at its last block.

    Args:
        orders: the rows.
        address: as of `ray.init`, such as auto or 10.0.0.1:6379.
        progress: told when a row is done.

    Raises:
        RecipeError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as problem:
        raise RecipeError(f"--ray needs Ray, which is not installed: {INSTALL}") from problem
    if not orders:
        return {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise RecipeError(
            f"There is no Ray cluster at {address!r} ({reason}); start one by `ray start --head`."
        ) from None
    try:
        return _collect(ray, orders, progress)
    finally:
        ray.shutdown()


def _collect(ray: Any, orders: Sequence[Order], progress: Progress) -> dict[str, dict[str, Any]]:
    remote = ray.remote(max_retries=1)(one_row)
    waiting = {}
    for order in orders:
        gpus = 1 if str(order.recipe.get("device", "cpu")).startswith("cuda") else 0
        waiting[remote.options(num_cpus=1, num_gpus=gpus).remote(asdict(order))] = order
    progress.stage("rows", len(orders))
    rows: dict[str, dict[str, Any]] = {}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        order = waiting.pop(done)
        try:
            rows[order.name] = ray.get(done)
        except Exception as fault:  # Ray wraps whatever happened to the worker
            reason = " ".join(str(fault).split())[:300]
            rows[order.name] = failed(order, f"its Ray worker failed ({type(fault).__name__}: {reason})")
        row = rows[order.name]
        if row["status"] != "done":
            progress.warn(f"{order.name}: {row['why']}")
        progress.advance(f"{order.name} on {row.get('host', '?')}")
    return rows


def one_row(order: dict[str, Any]) -> dict[str, Any]:
    """What a worker runs: one row, with nothing said; `host` and `process` tell where it ran."""
    from prunus.cli.session import QUIET_LIBRARIES

    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    wanted = Order(**order)
    if not Path(wanted.dense).is_file():
        why = f"{socket.gethostname()} does not see {wanted.dense}; OUT must lie on a disk that all machines share"
        return failed(wanted, why)
    return {**make(wanted, Shared(), Silent()), "host": socket.gethostname(), "process": os.getpid()}
