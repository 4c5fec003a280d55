"""Holes filled with pieces of the same picture, from coarse to fine.

The completion of Wexler et al. ("Space-Time Completion of Video", 2007): every patch that touches the hole shall look
like some patch that is known. In turns, the nearest known patch is looked for and each pixel in the hole becomes the
mean of what the patches over it say. The search is exhaustive on the coarsest level; on finer ones it begins with what
the coarser level found and tries neighbours' finds and random places (Barnes et al., "PatchMatch", 2009).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmcli.maths.smooth_inpainting import thin_plate_fill

RADIUS = 2  # patches of 5x5 pixels
UNKNOWN = 0.05  # weight of a guessed pixel in a distance, beside 1 of a known one
COARSEST = 64  # pixels of the longer side, at most
SOURCES = 4096  # known patches that an exhaustive search looks at, at most
ROUNDS = (3, 3, 2)  # searches on the coarsest level, the next, and all finer ones
RANDOM = 1  # random places that a patch tries a search, beside four neighbours' finds
CHUNK = 8192  # patches looked at at a time: few enough for a processor's cache, whatever the photograph's size


def patchmatch_fill(image: Tensor, hole: Tensor) -> Tensor:
    """A picture (c, H, W), float, whose hole, bool (H, W), is filled with texture from around it; a smooth filling
    (`thin_plate_fill`) where no patch is known. Known pixels stay. The same picture gives the same filling.

    Source: Wexler et al. 2007; Barnes et al. 2009. docs/experiments.md compares the two fillings.
    """
    height, width = hole.shape
    generator = torch.Generator().manual_seed(0)
    halvings = (-(-max(height, width) // COARSEST) - 1).bit_length()
    margin = (0, -width % 2**halvings, 0, -height % 2**halvings)
    smooth = thin_plate_fill(image[None].float(), hole[None])[0]
    levels = [(F.pad(smooth, margin), F.pad(hole, margin), F.pad(torch.ones_like(hole), margin))]
    for _ in range(halvings):
        u, unknown, inside = levels[-1]
        share = F.avg_pool2d(inside[None].float(), 2)
        mean = F.avg_pool2d((u * inside)[None], 2)[0] / share.clamp(min=0.25)
        levels.append((mean, _halved(unknown), _halved(inside)))
    found: tuple[_Level, Tensor] | None = None
    for n, (u, unknown, inside) in enumerate(reversed(levels)):
        level = _Level(unknown, inside)
        if found is None and not bool(level.usable.any()):
            continue  # nothing whole is known at this size
        rows = level.rows(u)
        if found is None:
            source = level.exhaustive_search(rows)
        else:
            source = level.upsample_matches(*found)
            rows = level.vote(rows, *level.upsample_pairs(*found))
        for turn in range(ROUNDS[min(n, len(ROUNDS) - 1)]):
            if turn or found is not None:
                source = level.propagate(rows, source, generator)
            rows = level.vote(rows, level.targets, source)
        found, smooth = (level, source), level.planes(rows)
    return smooth[:, :height, :width]


def _halved(mask: Tensor) -> Tensor:
    """bool (H/2, W/2): where any of four is set."""
    return F.max_pool2d(mask[None].float(), 2)[0] > 0


class _Level:
    """Patches of one size of the picture. Pixels are rows of a matrix, with a margin of RADIUS around the picture, and
    a patch is known by the row of its middle.

    hole, inside: bool (h, w); what is not `inside` lies beyond the picture and counts for nothing.
    """

    def __init__(self, hole: Tensor, inside: Tensor):
        hole, inside = (F.pad(mask, (RADIUS,) * 4) for mask in (hole & inside, inside))
        known = inside & ~hole
        self.shape, self.stride, self.hole = hole.shape, hole.shape[1], hole.flatten()
        span = torch.arange(-RADIUS, RADIUS + 1)
        self.offsets = (span[:, None] * self.stride + span).flatten()
        self.usable = ~_near(~known).flatten()  # patches that are known whole
        self.targets = (_near(hole) & inside).flatten().nonzero()[:, 0]  # patches that touch the hole
        self.weights = (known + UNKNOWN * hole).flatten()
        self.place = torch.full((hole.numel(),), -1)
        self.place[self.targets] = torch.arange(len(self.targets))

    def patch_rows(self, middles: Tensor) -> Tensor:
        """Rows of the pixels of patches, (n, pixels of a patch)."""
        return middles[:, None] + self.offsets

    def rows(self, u: Tensor) -> Tensor:
        """(c, h, w) -> (pixels, c)."""
        return F.pad(u, (RADIUS,) * 4).flatten(1).T.contiguous()

    def planes(self, rows: Tensor) -> Tensor:
        """(pixels, c) -> (c, h, w)."""
        return rows.T.reshape(-1, *self.shape)[:, RADIUS:-RADIUS, RADIUS:-RADIUS]

    def _weight(self, window: Tensor) -> Tensor:
        weight = self.weights[window]
        return weight / weight.sum(1, keepdim=True)

    def exhaustive_search(self, rows: Tensor) -> Tensor:
        """For each target the nearest of all known patches, or of SOURCES evenly spread ones."""
        source = self.usable.nonzero()[:, 0]
        source = source[:: -(-len(source) // SOURCES)]
        patches = F.embedding(self.patch_rows(source), rows)
        squares, patches = patches.square().sum(2).T, patches.flatten(1).T
        best = []
        for targets in self.targets.split(CHUNK // 8):
            window = self.patch_rows(targets)
            weight = self._weight(window)
            wanted = (F.embedding(window, rows) * weight[:, :, None]).flatten(1)
            best.append((weight @ squares - 2 * wanted @ patches).argmin(1))
        return source[torch.cat(best)]

    def propagate(self, rows: Tensor, source: Tensor, generator: torch.Generator) -> Tensor:
        """`source` where nothing nearer was met: beside the sources of four neighbours, and at random nearby."""
        reaches = [max(max(self.shape) >> (k + 1), 2) for k in range(RANDOM)]
        jumps = [torch.randint(-reach, reach + 1, (2, len(source)), generator=generator) for reach in reaches]
        jumps = [down * self.stride + right for down, right in jumps]
        best = []
        for part in torch.arange(len(source)).split(CHUNK):
            targets, own = self.targets[part], source[part]
            tries = []
            for step in (1, -1, self.stride, -self.stride):
                neighbour = self.place[targets + step]
                tries.append(torch.where(neighbour >= 0, source[neighbour] - step, own))
            tries += [own + jump[part] for jump in jumps]
            best.append(self._nearest(rows, targets, own, tries))
        return torch.cat(best)

    def _nearest(self, rows: Tensor, targets: Tensor, source: Tensor, tries: list[Tensor]) -> Tensor:
        """Of `source` and `tries`, (n,) each, the nearest to each of `targets`, by the weighted mean square."""
        window = self.patch_rows(targets)
        wanted, root = F.embedding(window, rows), self._weight(window).sqrt()[:, :, None]
        first = RADIUS * self.stride + RADIUS
        least = None
        for other in (source, *tries):
            other = other.clamp(first, len(self.hole) - 1 - first)
            error = F.embedding(self.patch_rows(other), rows).sub_(wanted).mul_(root).flatten(1)
            distance = error.square_().sum(1).masked_fill_(~self.usable[other], torch.inf)
            if least is None:
                least, source = distance, other
            else:
                nearer = distance < least
                least, source = torch.where(nearer, distance, least), torch.where(nearer, other, source)
        return source

    def vote(self, rows: Tensor, targets: Tensor, source: Tensor) -> Tensor:
        """`rows` whose pixels in the hole are the mean of what patches around `source` say over patches around
        `targets`."""
        total, count = torch.zeros_like(rows), torch.zeros(len(rows))
        for where, what in zip(targets.split(CHUNK), source.split(CHUNK)):
            where, what = self.patch_rows(where).flatten(), self.patch_rows(what).flatten()
            total.index_add_(0, where, F.embedding(what, rows))
            count.index_add_(0, where, torch.ones(len(where)))
        voted = (self.hole & (count > 0))[:, None]
        return torch.where(voted, total / count.clamp(min=1)[:, None], rows)

    def upsample_matches(self, coarse: "_Level", source: Tensor) -> Tensor:
        """What the coarser level found, for this one's targets."""
        y, x = self._place(self.targets)
        above, left = coarse._place(source[coarse.place[coarse._row(y // 2, x // 2)]])
        return self._row(2 * above + y % 2, 2 * left + x % 2)

    def upsample_pairs(self, coarse: "_Level", source: Tensor) -> tuple[Tensor, Tensor]:
        """The coarser level's targets and what it found for them, at twice their places."""
        targets, source = (self._row(*(2 * at for at in coarse._place(rows))) for rows in (coarse.targets, source))
        return targets, source

    def _place(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows // self.stride - RADIUS, rows % self.stride - RADIUS

    def _row(self, y: Tensor, x: Tensor) -> Tensor:
        return (y + RADIUS) * self.stride + x + RADIUS


def _near(mask: Tensor) -> Tensor:
    """bool (h, w): whether a patch around here holds such a pixel."""
    return F.max_pool2d(mask[None].float(), 2 * RADIUS + 1, 1, RADIUS)[0] > 0
