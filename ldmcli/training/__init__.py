"""The training loop and what it trains: autoencoders and diffusion models."""
