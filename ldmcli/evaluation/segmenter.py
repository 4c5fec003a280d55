"""A segmentation network that is trained on a data set's own rows, to read what samples show.

Frozen features of EfficientNet-lite0 at four strides (`FEATURE_STAGES`) under a small head, trained with cross-entropy.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmcli.core import files
from ldmcli.core.errors import ModelError
from ldmcli.evaluation.extractors import FEATURES, measuring_device
from ldmcli.maths import rng
from ldmcli.networks.feature_nets import EfficientNetLite0, load_frozen

TRAIN_STEPS, BATCH, LEARNING_RATE = 500, 8, 2e-3
FEATURE_STAGES = {2: 24, 4: 40, 10: 112, 15: 320}  # block of EfficientNet-lite0 -> channels; strides 4, 8, 16, 32
SHORT_SIDE = 224  # pixels to which a picture is brought for the features
WIDTH = 48
NO_CLASS = 255  # in a class map: a pixel that counts for nothing


class SegmentationHead(nn.Module):
    """Features of `FEATURE_STAGES`, (B, channels, h, w) each -> logits (B, classes, h, w) at the finest stride."""

    def __init__(self, classes: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1) for channels in FEATURE_STAGES.values())
        self.norm = nn.GroupNorm(8, WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.out = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        h = sum(
            F.interpolate(conv(x), size=size, mode="bilinear", align_corners=False)
            for conv, x in zip(self.lateral, features)
        )
        return self.out(F.relu(self.mix(F.relu(self.norm(h)))))


class Segmenter:
    """Class maps of pictures, by frozen features and a trained head for `classes` classes, on the device of
    measurements."""

    def __init__(self, classes: int):
        self.device = measuring_device()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(0, "judge"))
            self.head = SegmentationHead(classes).to(self.device)
        self.trunk = load_frozen(EfficientNetLite0, FEATURES["effnet-lite0"]()).to(self.device)

    def frozen(self) -> "Segmenter":
        """Itself, for use only."""
        self.head.eval().requires_grad_(False)
        return self

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> list[Tensor]:
        """uint8 (n, H, W, 3) -> the features of `FEATURE_STAGES`, (n, channels, h, w) each, half precision."""
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device).float()
        factor = SHORT_SIDE / min(x.shape[-2:])
        size = [max(32, round(side * factor / 32) * 32) for side in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        trunk: Any = self.trunk
        stages = []
        h = F.relu6(trunk._bn0(trunk._conv_stem((x - 127) / 128)))
        for k, block in enumerate(trunk._blocks):
            h = block(h)
            if k in FEATURE_STAGES:
                stages.append(h.half().contiguous())
        return stages

    @torch.inference_mode()
    def maps(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Class maps, uint8 (H, W), of uint8 (H, W, 3) pictures of one size."""
        out: list[np.ndarray] = []
        for start in range(0, len(images), BATCH):
            block = np.stack(images[start : start + BATCH])
            logits = self.head([one.float() for one in self.features(block)])
            logits = F.interpolate(logits, size=block.shape[1:3], mode="bilinear", align_corners=False)
            out += list(logits.argmax(1).to(torch.uint8).cpu().numpy())
        return out


def train_segmenter(
    images: Callable[[int], np.ndarray],
    truth: Callable[[int], np.ndarray],
    count: int,
    classes: int,
    *,
    steps: int = TRAIN_STEPS,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda n: None,
) -> Segmenter:
    """A segmenter of `classes` classes from `count` rows, all of one size: images(i) uint8 (H, W, 3), truth(i) uint8
    (H, W) with 255 = no class. Advances once a row and once a step."""
    segmenter, parts, maps = Segmenter(classes), [], []
    for start in range(0, count, BATCH):
        rows = range(start, min(start + BATCH, count))
        parts.append(segmenter.features(np.stack([images(i) for i in rows])))
        maps += [truth(i) for i in rows]
        advance(len(rows))
    features, targets = (
        [torch.cat(stage) for stage in zip(*parts)],
        torch.from_numpy(np.stack(maps)).to(segmenter.device),
    )
    optimizer = torch.optim.AdamW(segmenter.head.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    batch = min(BATCH, count)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (steps - step) / (0.6 * steps))
        epoch, place = divmod(step * batch, count - count % batch)
        ids = torch.from_numpy(rng.permutation(seed, epoch, count)[place : place + batch]).to(segmenter.device)
        logits = segmenter.head([stage[ids].float() for stage in features])
        logits = F.interpolate(logits, size=targets.shape[1:], mode="bilinear", align_corners=False)
        optimizer.zero_grad()
        F.cross_entropy(logits, targets[ids].long(), ignore_index=NO_CLASS).backward()
        optimizer.step()
        advance(1)
    return segmenter.frozen()


def load_segmenter(path: Path | None, classes: int) -> Segmenter | None:
    """The segmenter that `save_segmenter` wrote; None where there is none, or a damaged one, which is trained again."""
    if path is None or not path.is_file():
        return None
    try:
        tensors, _ = files.load_tensors(path)
        segmenter = Segmenter(classes)
        segmenter.head.load_state_dict(tensors)
    except (ModelError, RuntimeError):
        return None
    return segmenter.frozen()


def save_segmenter(path: Path, segmenter: Segmenter, metadata: dict[str, str]) -> None:
    """The weights of the head; those of the trunk come with its package."""
    files.save_tensors(path, segmenter.head.state_dict(), metadata)
