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
import prob_dml


def bare_against_whole(repeats=2, steps=4, batch=32, size=224):
    """Seconds of a bare ResNet50 step (forward, backward, Adam on pictures in memory) and of a whole training step as
    `nir.py` runs it in its second epoch: loading and augmenting JPEG files, ProxyAnchor, flow, gradient shares, progress."""
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    network = common.Network("resnet50", 128).to(memory_format=torch.channels_last).train()
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        for c in range(batch):                     # half of the classes train: as many as a batch needs
            (Path(folder) / f"photos/{c:03d}").mkdir(parents=True)
            for i in range(2 * steps if c < batch // 2 else 2):
                picture = (255 * torch.rand(3, 30, 40)).to(torch.uint8)
                picture = torchvision.transforms.functional.resize(picture, [375, 500])
                torchvision.transforms.functional.to_pil_image(picture).save(f"{folder}/photos/{c:03d}/{i}.jpg")
        for repeat in range(repeats):
            for step in range(steps + 1):
                start = time.perf_counter()
                adam.zero_grad()
                network(images).square().mean().backward()
                adam.step()
                bare += [time.perf_counter() - start] if step else []              # the first one warms up
            nir.main(["--dataset", "folder", "--data_root", f"{folder}/photos", "--weights", "none", "--epochs", "2",
                      "--batch_size", str(batch), "--image_size", str(size), "--device", "cpu",
                      "--out", f"{folder}/run{repeat}"])
            whole.append(float(list(csv.DictReader(open(f"{folder}/run{repeat}/log.csv")))[1]["seconds"]) / steps)
    return statistics.median(bare), statistics.median(whole)


def criterion_seconds(B=32, C=16, D=128, repeats=20):
    """Seconds of what NIR's training loop adds to the network's own work: ProxyAnchor and flow, forward and backward,
    and their Adam steps."""
    module = nir.NIR(nir.ProxyAnchor(C, D), D)
    adam = torch.optim.Adam(module.groups(1e-3))
    embeddings, labels, times = torch.randn(B, D, requires_grad=True), torch.arange(B) % C, []
    for _ in range(repeats):
        start = time.perf_counter()
        adam.zero_grad()
        sum(module.terms(embeddings, labels).values()).backward()
        adam.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def loop_elk(embeddings, labels, module):
    """EL-nivMF as one would write it down first: image by image, its samples broadcast against all classes."""
    mu, K, D = prob_dml.unit_vectors(module.proxies), module.concentrations, embeddings.shape[1]
    losses = []
    for e, label in zip(embeddings, labels):
        z = prob_dml.sample_vmf(prob_dml.unit_vectors(e[None]), e.norm()[None], module.samples)             # (S, 1, D)
        Kz, Kmu = K * z, K * mu                                                                             # (S, C, D)
        log_q = (prob_dml.log_vmf_normalizer(Kmu.norm(dim=1), D) + (Kz * Kmu).sum(2) / Kz.norm(dim=2)
                 + K.log().sum(1) - D * Kz.norm(dim=2).log())                                               # (S, C)
        similarity = log_q.logsumexp(0) / module.log_temperature.exp()
        losses.append(torch.nn.functional.cross_entropy(similarity, label))
    return torch.stack(losses).mean()


def elk_against_loop(B=90, C=100, D=512, S=5, repeats=9):
    """Seconds, forward and backward, of the EL-nivMF loss and of the loop over the images, alternating."""
    torch.manual_seed(0)
    module = prob_dml.ProbabilisticProxies(C, D, samples=S, temperature=1.0, concentration_init=18)
    embeddings, labels = (20 * torch.randn(B, D) / D ** 0.5).requires_grad_(), torch.randint(C, (B,))
    times = {module.forward: [], loop_elk: []}
    for _ in range(repeats):
        for loss, extra in ((module.forward, ()), (loop_elk, (module,))):
            start = time.perf_counter()
            loss(embeddings, labels, *extra).backward()
            times[loss].append(time.perf_counter() - start)
    return tuple(statistics.median(values[1:]) for values in times.values())


if __name__ == "__main__":
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fast, loop = elk_against_loop()
    print(f"EL-nivMF loss, B=90, C=100, D=512, S=5, 1 thread: {1e3 * fast:.1f} ms, loop over the images {1e3 * loop:.0f} ms, "
          f"ratio {loop / fast:.0f}", flush=True)
    torch.set_num_threads(threads)
    added = criterion_seconds()
    bare, whole = bare_against_whole()
    print(f"ResNet50, batch 32, {threads} threads: bare step {bare:.2f} s, whole training step with data loading on the same "
          f"cores {whole:.2f} s, ratio {whole / bare:.3f}; loss and flow alone {added:.3f} s, {100 * added / bare:.1f} %")
