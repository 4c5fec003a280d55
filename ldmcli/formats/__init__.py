"""Models of other tools, in and out: checkpoints of CompVis/latent-diffusion, folders of diffusers, run folders."""
