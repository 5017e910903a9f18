import numpy as np
import pytest
from PIL import Image

from sit_atconv import config

SIZE, IMAGES, SHARD = 16, 11, 4


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Eleven images of two classes, none of them its own mirror image."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(IMAGES):
        folder = root / ("cat" if index < 5 else "dog")
        folder.mkdir(exist_ok=True)
        pixels = random.integers(256, size=(SIZE, SIZE + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return root


@pytest.fixture
def recipe_path(pictures, vae_folder, recipe_file):
    data = {"kind": "imagefolder", "root": str(pictures), "image_size": SIZE}
    return recipe_file(data=data, latents={"codec": "vae", "vae": str(vae_folder), "batch_size": 3})


@pytest.fixture
def recipe(recipe_path):
    return config.load_recipe(recipe_path)
