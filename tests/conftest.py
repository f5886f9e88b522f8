"""One thread: tiny models gain nothing from more, and processes of one machine would fight for its cores."""

from __future__ import annotations

import os

# Before PyTorch is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("PRUNUS_THREADS", "1")
