"""Speed, side by side in one run: medians and ratios, which a noisy machine does not spoil.

    python tests/benchmark.py
"""
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import nir


def bare_against_whole(repeats=5, steps=3, batch=32, size=224):
    """Seconds of a bare ResNet50 step (forward, backward, Adam on pictures in memory) and of a whole training step as
    `nir.py` runs it: loading and augmenting JPEG files, ProxyAnchor, flow, gradient shares, progress."""
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    network = common.Network("resnet50", 128).to(memory_format=torch.channels_last).train()
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        for c in range(2 * batch // 2):            # as many training classes as a batch needs, and as many to test on
            (Path(folder) / f"photos/{c:03d}").mkdir(parents=True)
            for i in range(2 * steps):
                picture = (255 * torch.rand(3, 30, 40)).to(torch.uint8)
                picture = torchvision.transforms.functional.resize(picture, [375, 500])
                torchvision.io.write_jpeg(picture, f"{folder}/photos/{c:03d}/{i}.jpg")
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(steps):
                adam.zero_grad()
                network(images).square().mean().backward()
                adam.step()
            bare.append((time.perf_counter() - start) / steps)
            nir.main(["--dataset", "folder", "--data_root", f"{folder}/photos", "--weights", "none", "--epochs", "1",
                      "--batch_size", str(batch), "--image_size", str(size), "--device", "cpu",
                      "--out", f"{folder}/run{repeat}"])
            rows = list(csv.DictReader(open(f"{folder}/run{repeat}/log.csv")))
            whole.append(float(rows[0]["seconds"]) / steps)
    return statistics.median(bare[1:]), statistics.median(whole[1:])          # the first of each warms up


if __name__ == "__main__":
    bare, whole = bare_against_whole()
    print(f"\nResNet50, batch 32, {torch.get_num_threads()} threads: bare step {bare:.2f} s, whole training step "
          f"{whole:.2f} s, ratio {whole / bare:.3f}")
