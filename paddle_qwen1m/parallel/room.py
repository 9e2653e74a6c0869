"""In which lanes rows of a prefill go, and where what lies in the memory of a rank that the others bring them into."""

from __future__ import annotations

from typing import NamedTuple

FEW_LANES, MOST_LANES = 4, 8
"""What the last of a layer's lanes sends lies beside nothing: with eight it is an eighth."""
LEAST_LANE_ROWS = 128
"""Of one rank's last lane: fewer go with the lane before. So many are multiplied in FP8, too, where the others are."""
SUMS, ROWS = 0, 1
"""What comes: parts of a lane's sums, and its normed rows."""
FLAG_BYTES = 4


def lane_borders(rows: int, at_once: int) -> list[int]:
    """Where the lanes of one rank alone, of so many rows at once, begin, and the last one ends."""
    return [*range(0, max(1, rows - LEAST_LANE_ROWS + 1), at_once), rows]


def lanes_of(rows: int, least: int) -> int:
    """In how many lanes several ranks have so many rows: of `least` rows or more, beyond FEW_LANES of twice as many. A
    lane costs the host as much however many rows it has.
    """
    return max(1, min(FEW_LANES, rows // least), min(MOST_LANES, rows // (2 * least)))


class Room(NamedTuple):
    """For steps of up to `rows` rows, a multiple of degree, of `width` values of `itemsize` bytes. Behind each other,
    in rows of as many values: those of all ranks [rows], and of the sums of this rank's share the parts of each other
    rank, ascending [degree - 1, rows / degree]. Elsewhere flags uint32 [2, MOST_LANES, degree], each one rank's to set.
    """

    rows: int
    width: int
    degree: int
    itemsize: int

    @classmethod
    def of(cls, rows: int, width: int, degree: int, itemsize: int) -> Room:
        """For so many rows, and as many more as let the ranks divide them."""
        return cls(-(-rows // degree) * degree, width, degree, itemsize)

    @property
    def row_bytes(self) -> int:
        return self.width * self.itemsize

    @property
    def share(self) -> int:
        """Rows of a rank."""
        return self.rows // self.degree

    @property
    def height(self) -> int:
        """Rows of all of it."""
        return self.rows + (self.degree - 1) * self.share

    @property
    def flags(self) -> list[int]:
        """Their shape."""
        return [2, MOST_LANES, self.degree]

    def part(self, to: int, sender: int, row: int) -> int:
        """In the room of `to`, the byte where `sender` brings its part of the share's row `row`."""
        return (self.rows + (sender - (sender > to)) * self.share + row) * self.row_bytes

    def flag(self, what: int, lane: int, sender: int) -> int:
        """Of the flags, the byte where `sender` says which of these it has brought."""
        return ((what * MOST_LANES + lane) * self.degree + sender) * FLAG_BYTES
