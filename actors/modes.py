"""How a stream goes on past its first window. Without imports: clients of the protocol use these names too."""

from typing import Final, Literal

Mode = Literal["rolling", "overlap"]  # a window with a sink; segments that overlap by a block
MODES: Final[tuple[Mode, ...]] = ("rolling", "overlap")
