"""Everything that is measured, by name."""

from clean_transformer.benchmark.contestants.engines import EXPORTED
from clean_transformer.benchmark.contestants.limit import Limit
from clean_transformer.benchmark.contestants.ours import OURS
from clean_transformer.benchmark.contestants.peers import PEERS

ALL = OURS | PEERS | EXPORTED | {"limit": Limit}
