"""The UNet on latents larger than memory allows: overlapping tiles, blended without a seam (Sec. 4.3.2)."""

from torch import Tensor

from ldmcli.diffusion.guidance import Predict
from ldmcli.maths.tiles import TilePlan, blend, overlapping_tiles
from ldmcli.networks.conditioners import Conditioning


def tiled_predict(predict: Predict, tile: int, unit: int) -> Predict:
    """`DiffusionModel.predict` on tiles of `tile` latent positions a side, a third of it overlapping.

    (z (B, c, h, w), t (B,), conditioning) -> like z. Planes are cut alike, tokens and vector go to every tile. Tiles
    begin at multiples of `unit`, the UNet's size factor.
    """

    plans: dict[tuple[int, int], TilePlan] = {}

    def tiled(z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if max(z.shape[-2:]) <= tile:
            return predict(z, t, conditioning)
        size = (z.shape[-2], z.shape[-1])
        if size not in plans:  # a device waits for weights that come from the host
            plans[size] = overlapping_tiles(size, tile, tile // 3, unit=unit).to(z.device)
        plan = plans[size]

        def of_tile(k: int) -> Tensor:
            planes = conditioning.concat
            planes = None if planes is None else plan.cut(planes, plan.corners[k])
            part = Conditioning(conditioning.context, planes, conditioning.vector)
            return predict(plan.cut(z, plan.corners[k]), t, part).float()

        return blend(of_tile, plan)

    return tiled
