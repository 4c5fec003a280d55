"""The nearest of many rows, which arrive in blocks, for each of a few queries."""

import numpy as np


class Nearest:
    """The k nearest of all rows that `add` was given, for each of the queries (n, D).

    numbers: (n, k) int64, -1 where there are fewer rows; distances: (n, k), Euclidean, rising; equal ones in order of
    rows. Memory: O(n·k), whatever the number of rows.
    """

    def __init__(self, queries: np.ndarray, k: int):
        self.queries = queries.astype(np.float64)
        self._squares = np.square(self.queries).sum(1)[:, None]
        self.numbers = np.full((len(queries), k), -1, np.int64)
        self.distances = np.full((len(queries), k), np.inf)

    def add(self, numbers: np.ndarray, features: np.ndarray) -> None:
        """Takes rows `numbers`, rising from call to call, with their features (m, D)."""
        rows = features.astype(np.float64)
        squared = self._squares + np.square(rows).sum(1) - 2 * self.queries @ rows.T
        distances = np.concatenate([self.distances, np.sqrt(np.maximum(squared, 0))], 1)
        known = np.concatenate([self.numbers, np.broadcast_to(numbers, squared.shape)], 1)
        order = np.argsort(distances, 1, kind="stable")[:, : self.numbers.shape[1]]
        self.numbers = np.take_along_axis(known, order, 1)
        self.distances = np.take_along_axis(distances, order, 1)
