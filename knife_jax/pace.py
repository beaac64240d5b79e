"""How many rounds a chunk holds."""

TARGET_SECONDS = 2.0
"""How long a chunk is to last: short enough to watch and to stop, long enough that the host's part costs nothing."""
_FIRST_ROUNDS, _MOST_GROWTH = 16, 8


class Pace:
    """Finds the number of rounds that last for `TARGET_SECONDS`; it has no influence on results.

    Args:
        fixed: always so many rounds, whatever they last.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._rounds = fixed or _FIRST_ROUNDS

    def rounds(self, most: int) -> int:
        """The rounds of the next chunk, at most `most`."""
        return min(self._rounds, most)

    def took(self, rounds: int, seconds: float) -> None:
        """Learns from a chunk. Rounds last longer once learning begins, so the number grows step by step and falls at once."""
        if self._fixed is None:
            wanted = int(rounds * TARGET_SECONDS / max(seconds, 1e-6))
            self._rounds = max(1, min(wanted, _MOST_GROWTH * self._rounds))
