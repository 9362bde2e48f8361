"""Large matrices are worked on a few rows at a time, so that intermediate numbers take little memory."""

PIECE = 2**22  # numbers at once; each step keeps a few for each, a dozen at most


def rows_at_once(cols: int) -> int:
    """Rows of so many columns in a piece, at least one.

    >>> rows_at_once(1024), rows_at_once(2**30)
    (4096, 1)
    """
    return max(1, PIECE // max(cols, 1))
