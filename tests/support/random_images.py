"""Images for tests."""

import numpy as np
from PIL import Image


def random_image(seed: int, width: int, height: int) -> Image.Image:
    """Return noise: no two images look alike to a random tower."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
