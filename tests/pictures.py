"""The picture at the top of the README.

    python tests/pictures.py .pictures/similarities.png
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.utils import make_grid, save_image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import prob_dml

VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]


def save_distributions(path, size=200):
    """A picture file. Two spheres with the densities of a vMF and a nivMF, then for every similarity of `prob_dml` the
    plane of embeddings, the origin in the middle: how similar an embedding there is to the vMF proxy at the cross. An
    embedding's angle to the proxy and its norm can be read off. Bands are contour lines, yellow is most."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    sphere = torch.stack([x, y, (1 - x ** 2 - y ** 2).clamp(min=0).sqrt()], dim=2)       # (size, size, 3), the near half
    mu = F.normalize(torch.tensor([[0.1, 0.2, 0.97]]))
    values = {"vMF": prob_dml.vmf_log_prob(sphere, mu[0], torch.tensor(15.0)).exp(),
              "nivMF": prob_dml.nivmf_log_prob(sphere, mu, torch.tensor([[5.0, 15.0, 10.0]]))[..., 0].exp()}
    embeddings, direction = 30 * torch.stack([x, y], dim=2).view(-1, 2), torch.tensor([[1.0, 0.0]])
    for name, functions in prob_dml.SIMILARITIES.items():
        values[name] = functions["vmf"](embeddings, direction, torch.tensor([15.0])).view(size, size)
    tiles = []
    for name, value in values.items():
        on_sphere = name.endswith("MF")
        level = (value - value.min()) / (value.max() - value.min())
        if not on_sphere:
            level = 1 - (1 - level).sqrt()             # a distance: cosine's bands are equal angles, l2's equal lengths
        band = level.mul(16).floor().div(16).numpy() * (len(VIRIDIS) - 1)
        tile = np.stack([np.interp(band, range(len(VIRIDIS)), channel) for channel in zip(*VIRIDIS)])   # (3, size, size)
        tile[:, (x ** 2 + y ** 2 > 1).numpy() & on_sphere] = 255
        if not on_sphere:
            row, column = size // 2, size * 3 // 4                                                     # where the proxy is
            tile[:, row - 3:row + 4, column] = tile[:, row, column - 3:column + 4] = 255
        tile = Image.fromarray(tile.astype(np.uint8).transpose(1, 2, 0))
        captioned = Image.new("RGB", (size, size + 20), "white")
        captioned.paste(tile, (0, 20))
        ImageDraw.Draw(captioned).text((size // 2, 10), name, fill="black", anchor="mm")
        tiles.append(torch.from_numpy(np.array(captioned).transpose(2, 0, 1)) / 255)
    with data.clear_errors(f"writing {path}", "give another file"):
        save_image(make_grid(tiles, nrow=4, padding=8, pad_value=1), path, format="png")


if __name__ == "__main__":
    save_distributions(sys.argv[1])
