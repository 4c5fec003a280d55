"""A trained model in use: loading, sampling, super-resolution, inpainting, and folders of images."""
