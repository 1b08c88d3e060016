"""The order of images that are read shard by shard, from a disk or a server slower than memory."""

from dataclasses import dataclass

import numpy as np

from fastlab.orders import epoch_order

_SHARDS = 1 << 31  # joined to an epoch: the order of shards is unrelated to any order of images


@dataclass(frozen=True)
class WindowedOrder:
    """Permutations that need only a few shards at a time.

    An epoch takes the shards in a random sequence, cuts the images of that sequence into `lanes`
    equal parts, and each part into windows of `window` successive shards. The images of a window
    are permuted together, and every batch takes an equal share from each lane. A shard that two
    lanes cut belongs to both, so that at most `lanes` - 1 shards are read twice.
    """

    rows: np.ndarray
    """int64 [images]: the numbers of the images in the order in which they lie in the shards."""
    sizes: np.ndarray
    """int64 [shards]: the images in each shard."""
    window: int
    lanes: int

    def epoch(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        """A permutation of `rows`, int64: a pure function of the arguments and of this order.

        `batch_size`, over all processes, is a multiple of `lanes`; the images left over, less than
        a batch, come last.
        """
        images = len(self.rows)
        sequence = epoch_order(len(self.sizes), seed, epoch | _SHARDS)
        sizes, starts = self.sizes[sequence], (np.cumsum(self.sizes) - self.sizes)[sequence]
        places = np.arange(images)
        lane = places * self.lanes // images
        shard = np.repeat(np.arange(len(sizes)), sizes)
        cuts = np.searchsorted(lane, np.arange(1, self.lanes))
        first = shard[np.r_[0, cuts]]  # of each lane
        window = lane * len(sizes) + (shard - first[lane]) // self.window
        rows = self.rows[places + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)]
        shuffled = epoch_order(images, seed, epoch)
        order = rows[shuffled[np.argsort(window[shuffled], kind="stable")]]
        return _interleaved(np.split(order, cuts), images // batch_size, batch_size)


def _interleaved(lanes: list[np.ndarray], steps: int, batch_size: int) -> np.ndarray:
    """The images of all lanes, int64: batches with an equal share of each, then the rest."""
    share = batch_size // len(lanes)
    shares = [lane[: steps * share].reshape(steps, share) for lane in lanes]
    rest = [lane[steps * share :] for lane in lanes]
    return np.concatenate([np.concatenate(shares, axis=1).reshape(-1), *rest])
