"""Which tiles of the scores a mask leaves empty, full or partial, in O(tiles)."""

from .block_mask import EMPTY as EMPTY
from .block_mask import FULL as FULL
from .block_mask import PARTIAL as PARTIAL
from .block_mask import BlockMask as BlockMask
from .block_mask import Grid as Grid
from .block_mask import block_kinds as block_kinds
from .block_mask import create_block_mask as create_block_mask
from .block_mask import first_position as first_position
