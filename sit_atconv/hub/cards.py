"""The cards of what is no pipeline: a swap's delta, and a cache of latents. That of a pipeline is `pipelines.card`."""

import json
from collections.abc import Sequence
from typing import Any

from sit_atconv.pipelines.card import shell
from sit_atconv.runtime.markdown import markdown_table, plain
from sit_atconv.version import __version__

DELTA = """---
license: {license}
library_name: sit_atconv{base}
tags:
- attention-swap
- atconv
---

# {name}

{count} attentions of a `{model}` replaced by 3x3 Attentive Convolution
([arXiv 2510.20092](https://arxiv.org/abs/2510.20092)). This is a delta: it holds the new layers alone, and fits only
the weights that it was made from.

## The delta

{table}

## Use

    pip install sit_atconv

```python
from sit_atconv import swap_attention

# model: the `{model}` named above, unchanged, in float32 or bfloat16; or a pipeline that has it
swap = swap_attention(model, weights="{repo}")
swap.revert()  # the attention is back, bit for bit
```

{lines}
"""
CACHE = """---
license: {license}
viewer: false
tags:
- latents
- flow-matching
- sit_atconv
---

# {name}

A cache of latents: for both flips of every image, the mean and log-variance that an autoencoder gave. Training draws
new latents from them at every visit, without the autoencoder and without the images.

## The cache

{table}

## Use

{lines}

A file of moments holds `moments` (N, 2, 2C, h, w), the second axis being the image and its mirror image, and `labels`
(N,). `index.json` has the SHA-256 of every file. To see images, the same autoencoder is needed; no other is taken, by
the SHA-256 in the index.

## Limits

- These are made of images of others: the licence of the images holds for their latents too.
- A latent can be decoded to an image that is close to the original.
"""


def of_delta(stored: dict[str, Any], size: int, base: str | None, repo: str, license: str, lines: Sequence[str]) -> str:
    """The card of a delta. stored: what its file says of the swap. size: numbers in its tensors. base: the model that
    it is for, by its name on the hub."""
    teacher = stored["teacher"]
    rows = {
        "for": f"`{plain(teacher['class'])}`, {base or plain(teacher['name'] or 'without a name')}",
        "revision": plain(teacher["revision"] or "not recorded"),
        "weights": f"fingerprint {plain(teacher['fingerprint'][:12])}",
        "layers": f"{len(stored['layers']):,}, {size:,} parameters",
        "kernel, pool": f"{stored['kernel_size']}, {plain(stored['pool'])}",
        "made with": f"sit_atconv {__version__}",
    }
    return DELTA.format(
        license=license, base="" if base is None else f"\nbase_model: {base}", name=plain(repo.rpartition("/")[2]),
        count=f"{len(stored['layers']):,}", model=plain(teacher["class"]), table=markdown_table(["", ""], rows.items()),
        repo=repo, lines=shell(lines),
    )  # fmt: skip


def of_cache(index: dict[str, Any], repo: str, license: str, lines: Sequence[str]) -> str:
    """The card of a cache of latents, whose index it is."""
    codec, size = index["codec"], sum(shard["bytes"] for shard in index["shards"])
    names = index["class_names"]
    shown = ", ".join(map(plain, names[:20])) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
    rows = {
        "images": f"{index['num_images']:,}, {index['image_size']} px, {plain(index['crop'])}",
        "classes": f"{len(names):,}: {shown}",
        "latents": f"{' x '.join(map(str, index['latent_shape']))}, stored in {index['dtype']}, {size / 1e6:,.1f} MB",
        "autoencoder": f"{plain(codec['vae'])}, SHA-256 {plain(codec['sha256'])}",
        "scale, shift": f"{codec['scale']:g}, {codec['shift']:g}",
        "made from": plain(json.dumps(index["data"], ensure_ascii=False)),
        "made with": f"sit_atconv {__version__}",
    }
    return CACHE.format(
        license=license, name=plain(repo.rpartition("/")[2]), table=markdown_table(["", ""], rows.items()),
        lines=shell(lines),
    )  # fmt: skip
