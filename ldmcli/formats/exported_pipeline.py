"""Pipeline of a latent diffusion model whose parts have no pipeline in diffusers.

from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
images = pipe(prompt=["…"], seed=0).images
"""

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class LatentDiffusionPipeline(DiffusionPipeline):
    """model: the own part; unet, vqvae, tokenizer: present where a class of diffusers or transformers computes them."""

    _optional_components = ["unet", "vqvae", "tokenizer"]

    def __init__(self, model, unet=None, vqvae=None, tokenizer=None):
        super().__init__()
        self.register_modules(model=model, unet=unet, vqvae=vqvae, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        *,
        class_labels=None,
        layout=None,
        segmentation=None,
        image=None,
        mask_image=None,
        batch_size=1,
        num_inference_steps=None,
        guidance_scale=None,
        sampler=None,
        eta=None,
        spacing=None,
        seed=0,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Pictures, one for each prompt, class, layout, map or image; `batch_size` where there is none of them.

        prompt: text or list; class_labels: numbers or names; layout: dicts of "bbox" (x, y, w, h as shares) and
        "category"; segmentation: class indices (H, W); image: PIL or uint8 (H, W, 3), the small picture or the one with
        a hole; mask_image: PIL or (H, W), white is sampled anew. None takes the model's own steps, guidance, sampler.
        latents: initial noise (B, c, h, w); generator: makes it; else it follows from `seed` as in `ldm sample`.
        output_type: "pil", "np" in [0, 1], "pt" in [0, 1], or "latent".
        """
        values = self._values(prompt, class_labels, layout, segmentation, image, mask_image)
        n = max([len(own) for own in values.values()], default=batch_size if latents is None else len(latents))
        values = {name: [own[k % len(own)] for k in range(n)] for name, own in values.items()}
        inputs = self.model.inputs(values, self.tokenizer) if values else None
        shape = tuple(self.model.config.latent_shape)
        if latents is None and generator is not None:
            latents = torch.randn((n, *shape), generator=generator, device=generator.device)
        steps = num_inference_steps or self.model.sampling.steps
        with self.progress_bar(total=steps) as bar:
            z = self.model.sample_latents(
                self.unet,
                self.vqvae,
                inputs,
                n,
                seed=seed,
                latents=latents,
                progress=bar.update,
                sampler=sampler,
                steps=steps,
                guidance=guidance_scale,
                eta=eta,
                spacing=spacing,
            )
        images = z if output_type == "latent" else self._pictures(self.model.decode(self.vqvae, z), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _values(self, prompt, classes, layout, segmentation, image, mask):
        """{condition: its values}. Raises ValueError for what is missing."""
        arguments = {
            "text": [prompt] if isinstance(prompt, str) else prompt,
            "class": classes,
            "layout": [layout] if isinstance(layout, dict) else layout,
            "map": segmentation,
            "lowres": image,
            "masked": image,
        }
        values = {}
        for name in self.model.conditions.kinds:
            own = arguments.get(name)
            if own is None:
                raise ValueError(f"this model is told: {', '.join(self.model.conditions.kinds)}; {name} is missing")
            own = list(own) if isinstance(own, (list, tuple)) else [own]
            if name in ("map", "lowres", "masked"):
                own = [
                    np.asarray(one.convert("RGB") if name != "map" and hasattr(one, "convert") else one) for one in own
                ]
            if name == "masked":
                masks = mask if isinstance(mask, (list, tuple)) else [mask]
                masks = [np.asarray(one.convert("L") if hasattr(one, "convert") else one) for one in masks]
                masks = [one if one.dtype == bool else one >= 128 for one in masks]
                own = [(one, masks[k % len(masks)]) for k, one in enumerate(own)]
            values[name] = own
        return values

    @staticmethod
    def _pictures(x, output_type):
        if output_type == "pil":
            from PIL import Image

            whole = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            return [Image.fromarray(one) for one in whole]
        x = (x / 2 + 0.5).clamp(0, 1)
        return x.cpu().permute(0, 2, 3, 1).float().numpy() if output_type == "np" else x
