"""Metrics of images and models, and the streams of images that they are measured on."""
