"""Counts the graphs, graph breaks and fallbacks of `torch.compile`, and looks up backends."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from clean_transformer.parity.verdict import Check, Verdict

# Why a mode with compiled modules is NOT CHECKED if `torch.compile` made no graph.
NO_GRAPH = "torch.compile made no graph, so all modules ran as they are written"

# Dynamo replaces a function by code that calls each graph by a name that starts like this.
GRAPH = "__compiled_fn"


@dataclass
class Graphs:
    """What `torch.compile` did: the number of graphs, of graph breaks, and of uncompiled frames.

    A graph break splits a function into several graphs, with Python code between them. A frame is a
    Python function that PyTorch tried to compile. If the attempt fails, the function runs as it is
    written.
    """

    compiled: int = 0
    breaks: int = 0
    uncompiled: int = 0

    def in_words(self) -> dict[str, str]:
        """Return the counts as texts, for the settings in a report."""
        return {
            "graphs compiled": str(self.compiled),
            "graph breaks": str(self.breaks),
            "functions left uncompiled": str(self.uncompiled),
        }

    def checks(self) -> list[Check]:
        """Return a check with the verdict NOT CHECKED if no graph was compiled, or else nothing."""
        return [] if self.compiled else [Check("compilation", Verdict.NOT_CHECKED, note=NO_GRAPH)]


@contextmanager
def counted_graphs() -> Iterator[Graphs]:
    """Count what `torch.compile` does in a `with` block. The counts are set when it ends."""
    graphs, before = Graphs(), counts()
    try:
        yield graphs
    finally:
        for name, now in vars(counts()).items():
            setattr(graphs, name, now - getattr(before, name))


def counts() -> Graphs:
    """Return what `torch.compile` has done in this process."""
    # Dynamo keeps no public count of graph breaks.
    counters = torch._dynamo.utils.counters
    return Graphs(
        compiled=counters["stats"]["unique_graphs"],
        breaks=sum(counters["graph_break"].values()),
        uncompiled=counters["frames"]["total"] - counters["frames"]["ok"],
    )


def runs_graph(run: Callable[[], Any]) -> bool:
    """Call `run()`, and return whether a graph ran that `torch.compile` had made before."""
    found = False

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        caller = frame.f_back
        names = caller.f_code.co_names if caller is not None and event == "call" else ()
        found = found or any(name.startswith(GRAPH) for name in names)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def require_backend(name: str) -> None:
    """Raise `ValueError` if no compile backend has this name."""
    names = torch._dynamo.list_backends(None)
    if name not in names:
        raise ValueError(
            f"no compile backend {name!r}; choose from {', '.join(names)}, or import the package "
            "that registers it with --import"
        )
