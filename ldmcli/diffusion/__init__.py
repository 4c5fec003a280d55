"""The diffusion process of the paper (Sec. 3.2, 3.3): schedule, loss, samplers, guidance. Read this first."""
