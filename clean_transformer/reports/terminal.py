"""Shows tables and heat maps in a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from clean_transformer.reports.heat_map import HeatMap


class FoldingTable(Table):
    """A table of the library `rich` that continues long cells on the next line."""

    def add_column(self, *arguments: Any, **options: Any) -> None:
        """Add a column. The arguments are those of `rich.table.Table.add_column`."""
        super().add_column(*arguments, **{"overflow": "fold"} | options)


def heat_map_table(maps: Mapping[str, HeatMap]) -> Table:
    """Return a table with one row per activation.

    The first column has the name of the activation. The second column shows the squares of the
    first map in `maps`, with one character per layer. Then there is one column per map, whose
    heading is the map's key in `maps`. This column has the label of the activation's square
    with the largest `concern`, which says how bad its value is.
    """
    drawn = next(iter(maps.values()))
    ruler = "".join(str(layer % 10) for layer in drawn.layers)
    # On a narrow terminal, a row's characters continue on the next line.
    layers = Column(ruler, overflow="fold")
    table = Table(Column(no_wrap=True), layers, *maps, box=None, padding=(0, 2, 0, 0))
    for name, squares in drawn.rows.items():
        bars = Text()
        for layer in [None] if None in squares else drawn.layers:
            if square := squares.get(layer):
                bars.append(square.mark or square.bar, square.style)
            else:
                bars.append(" ")
        values = (heat.worst(name).label if name in heat.rows else "" for heat in maps.values())
        table.add_row(name, bars, *values)
    return table
