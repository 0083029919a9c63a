"""Speed and memory, side by side in one run: medians and ratios, which a noisy machine does not spoil.

    python tests/benchmark.py             everything, on a GPU if there is one; about a quarter of an hour on two cores
    python tests/benchmark.py --quick     smaller sizes, two minutes

One line each: what is measured, its time, that of the reference, and reference / time. References are what one would
write down first. Retrieval and losses run on one thread (CPU), the network on all.
"""
import argparse
import csv
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")         # before torch is loaded, as the scripts have it
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import scipy.spatial
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import evaluate
import nir
import objectives
import prob_dml

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(*functions, repeats=5, warm=1):
    """Median seconds of each function, called in turn; the first `warm` rounds do not count."""
    times = [[] for _ in functions]
    for _ in range(repeats + warm):
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [statistics.median(own[warm:]) for own in times]


def line(what, ours, reference=None, unit="s", note=""):
    ratio = f"{reference / ours:8.2f}" if reference else " " * 8
    reference = f"{reference:12.4g}" if reference else " " * 12
    print(f"{what:64s} {ours:12.4g} {reference} {ratio}  {unit:9s} {note}".rstrip(), flush=True)


def header(title, reference):
    print(f"\n{title:64s} {'time':>12s} {'reference':>12s} {'ratio':>8s}  reference: {reference}", flush=True)


def peak(function):
    """MiB by which the process grows at most while `function` runs (Linux)."""
    def memory(name):
        return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 2 ** 10
    Path("/proc/self/clear_refs").write_text("5")                               # the high-water mark begins anew
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


# ------------------------------------------------------------------------------------------------------- retrieval

def retrieval(n, queries, dim=512):
    """Exact Recall@1 .. 1000 of n images, five of a class, against searches for `queries` of them, scaled to n."""
    labels = torch.arange(n, device=DEVICE) // 5
    x = F.normalize(torch.randn(n // 5 + 1, dim, device=DEVICE)[labels] + 3 * torch.randn(n, dim, device=DEVICE))
    ks, rows, found = (1, 10, 100, 1000), evaluate.CHUNK // n, []
    x[:10] @ x.T                                                                 # a GPU's start-up is nobody's

    def product():
        for part in x.split(rows):
            part @ x.T
    memory = peak(lambda: found.extend(seconds(lambda: evaluate.recall_at_k(x, labels, ks), repeats=1, warm=0)))
    ours, bare = found[0], seconds(product, repeats=1, warm=0)[0]
    header(f"Recall@1, 10, 100, 1000 of {n} x {dim}", "see each line")
    line("recall_at_k", ours, bare, note="the bare matrix product in the same chunks")
    line("recall_at_k, MiB above the embeddings", memory, unit="MiB", note="" if DEVICE.type == "cpu" else "host memory")

    def top_k():
        (x[:queries] @ x.T).topk(1000)

    def full_sort():
        (x[:queries] @ x.T).argsort(1, descending=True)
    found = seconds(top_k, full_sort, repeats=1, warm=0)
    line("recall_at_k", ours, found[0] * n / queries, note=f"topk(1000) of all similarities, {queries} queries, scaled")
    line("recall_at_k", ours, found[1] * n / queries, note=f"a full sort of all similarities, {queries} queries, scaled")
    tree = scipy.spatial.cKDTree(x.cpu().numpy())
    few = max(2, queries // 128)
    searched = seconds(lambda: tree.query(x[:few].cpu().numpy(), k=1000), repeats=1, warm=0)[0]
    line("recall_at_k", ours, searched * n / few, note=f"scipy's cKDTree, k = 1000, {few} queries, scaled")


# ---------------------------------------------------------------------------------------------------------- losses
# References: from the formula, image by image.

def loop_proxynca(module, embeddings, labels):
    losses = []
    for e, y in zip(F.normalize(embeddings), labels):
        distances = (e - F.normalize(module.proxies)).square().sum(1)
        losses.append(F.cross_entropy(-distances / module.temperature, y))
    return torch.stack(losses).mean()


def loop_proxyanchor(module, embeddings, labels):
    pull, push = [], []
    s = F.normalize(embeddings) @ F.normalize(module.proxies).T
    for c in range(len(module.proxies)):
        if (labels == c).any():
            pull.append((1 + (-module.alpha * (s[labels == c, c] - module.margin)).exp().sum()).log())
        push.append((1 + (module.alpha * (s[labels != c, c] + module.margin)).exp().sum()).log())
    return torch.stack(pull).mean() + torch.stack(push).mean()


def loop_softtriple(module, embeddings, labels):
    centers, losses = F.normalize(module.proxies, dim=-1), []
    C, K, _ = centers.shape
    for e, y in zip(F.normalize(embeddings), labels):
        s = (centers * e).sum(2)                                                                            # (C, K)
        S = ((s / module.gamma).softmax(1) * s).sum(1)
        losses.append(F.cross_entropy(module.la * (S - module.margin * F.one_hot(y, C)), y))
    merge = [(w[k] - w[m]).square().sum().clamp(min=1e-5).sqrt() for w in centers for k in range(K) for m in range(k + 1, K)]
    return torch.stack(losses).mean() + module.tau * torch.stack(merge).sum() / (C * K * (K - 1))


def loop_flow(flow, psi, rho):
    return torch.stack([-flow.log_prob(a[None], b[None])[0] for a, b in zip(psi, rho)]).mean()


def loop_prob(module, embeddings, labels):
    """The loss of ProbabilisticProxies image by image; an image's samples are broadcast against all classes."""
    mu, D = prob_dml.unit_vectors(module.proxies), embeddings.shape[1]
    K = module.lengths if module.metric == "l2" else module.concentrations
    log_c, losses = prob_dml.log_vmf_normalizer, []

    def log_q(z):                                                                               # (S, 1, D) -> (S, C)
        if module.proxy == "vmf":
            return log_c(K[:, 0], D) + (K * mu * z).sum(2)
        Kz, Kmu = K * z, K * mu                                                                 # (S, C, D)
        return (log_c(Kmu.norm(dim=1), D) + (Kz * Kmu).sum(2) / Kz.norm(dim=2) + K.log().sum(1)
                - D * Kz.norm(dim=2).log())
    for e, label in zip(embeddings, labels):
        k1, mu1 = e.norm(), prob_dml.unit_vectors(e[None])
        r = 0.5 if module.metric == "bhattacharyya" else 1.0
        if module.metric == "cosine":
            similarity = (mu1 * mu).sum(1)
        elif module.metric == "l2":
            similarity = -(e - K * mu).square().sum(1)
        elif module.metric == "loglik":
            similarity = log_q(mu1[None])[0]
        elif module.metric == "kl":
            entropy = -log_c(k1, D) - k1 * prob_dml.mean_resultant_length(k1, D)
            if module.proxy == "vmf":
                similarity = log_c(K[:, 0], D) + prob_dml.mean_resultant_length(k1, D) * (K * mu * mu1).sum(1) + entropy
            else:
                similarity = log_q(prob_dml.sample_vmf(mu1, k1[None], module.samples)).mean(0) + entropy
        elif module.proxy == "vmf":
            similarity = r * (log_c(k1, D) + log_c(K[:, 0], D)) - log_c(r * (e + K * mu).norm(dim=1), D)
        else:
            z = prob_dml.sample_vmf(mu1, k1[None], module.samples)
            log_p = prob_dml.vmf_log_prob(z[:, 0], mu1, k1)                                                     # (S,)
            similarity = (r * log_q(z) + (r - 1) * log_p[:, None]).logsumexp(0) - math.log(module.samples)
        losses.append(F.cross_entropy(similarity / module.temperature, label))
    return torch.stack(losses).mean()


class BesselNormalizer(torch.autograd.Function):
    """log C_D(kappa) as scipy has it, with its derivative, minus the ratio of two Bessel functions."""

    @staticmethod
    def forward(ctx, kappa, D):
        k, v = kappa.detach().double().cpu().numpy(), D / 2 - 1
        bessel = scipy.special.ive(v, k)                                                        # exp(-k) I_v(k)
        ctx.save_for_backward(kappa.new_tensor(scipy.special.ive(v + 1, k) / bessel))
        return kappa.new_tensor(v * np.log(k) - (v + 1) * math.log(2 * math.pi) - np.log(bessel) - k)

    @staticmethod
    def backward(ctx, grad):
        return -grad * ctx.saved_tensors[0], None


def wood_sample(mu, kappa, D):
    """One sample (D,) by Wood's rejection step as he gives it; the accepted proposal is differentiated."""
    b = (D - 1) / (2 * kappa + (4 * kappa ** 2 + (D - 1) ** 2).sqrt())
    x0 = (1 - b) / (1 + b)
    c = kappa * x0 + (D - 1) * (1 - x0 ** 2).log()
    beta = torch.distributions.Beta(torch.full_like(kappa, (D - 1) / 2), torch.full_like(kappa, (D - 1) / 2))
    accepted = False
    while not accepted:
        e = beta.sample()
        w = (1 - (1 + b) * e) / (1 - (1 - b) * e)
        accepted = kappa * w + (D - 1) * (1 - x0 * w).log() - c >= torch.rand_like(w).log()
    v = torch.randn_like(mu)
    v = F.normalize(v - (v * mu).sum() * mu, dim=0)
    return w * mu + (1 - w ** 2).sqrt() * v


def loop_elk(module, embeddings, labels):
    """EL-nivMF as one writes it down: image by image, sample by sample, with nothing of prob_dml.py. The classes' part,
    which all images share, is taken out of the loop."""
    mu, K, D = F.normalize(module.proxies), module.concentrations, embeddings.shape[1]
    Kmu, losses = K * mu, []
    log_factor = BesselNormalizer.apply(Kmu.norm(dim=1), D) + K.log().sum(1)                                # (C,)
    for e, label in zip(embeddings, labels):
        log_q = []
        for _ in range(module.samples):
            Kz = K * wood_sample(F.normalize(e, dim=0), e.norm(), D)                                        # (C, D)
            log_q.append(log_factor + (Kz * Kmu).sum(1) / Kz.norm(dim=1) - D * Kz.norm(dim=1).log())        # (C,)
        similarity = torch.stack(log_q).logsumexp(0) - math.log(module.samples)
        losses.append(F.cross_entropy(similarity / module.temperature, label))
    return torch.stack(losses).mean()


def losses(B=90, C=100, D=512, S=5, repeats=7):
    """Forward and backward of every loss against its loop. Where nothing is sampled the two must agree."""
    torch.manual_seed(0)
    embeddings = (20 * torch.randn(B, D, device=DEVICE) / D ** 0.5).requires_grad_()
    labels = torch.randint(C, (B,), device=DEVICE)
    header(f"loss, forward and backward, B = {B}, C = {C}, D = {D}, S = {S}", "image by image")

    def compare(what, ours, reference, exact=True):
        if exact and not torch.allclose(ours(), reference(), rtol=1e-3, atol=1e-4):
            raise SystemExit(f"{what}: {ours()} is not the reference's {reference()}")
        line(what, *seconds(lambda: ours().backward(), lambda: reference().backward(), repeats=repeats))
    for (name, kind), loop in zip(nir.LOSSES.items(), (loop_proxynca, loop_proxyanchor, loop_softtriple)):
        module = kind(C, D).to(DEVICE)
        compare(name, lambda: module(embeddings, labels), lambda: loop(module, embeddings, labels))
    flow = nir.GlowFlow(D, D).to(DEVICE)
    psi, rho = F.normalize(embeddings).detach(), F.normalize(torch.randn(C, D, device=DEVICE))[labels]
    compare("flow (nll)", lambda: -flow.log_prob(psi, rho).mean(), lambda: loop_flow(flow, psi, rho))
    for proxy in ("vmf", "nivmf"):
        for metric in prob_dml.SIMILARITIES:
            if proxy == "nivmf" and metric in ("cosine", "l2"):
                continue
            module = prob_dml.ProbabilisticProxies(C, D, metric, proxy, samples=S, temperature=1.0,
                                                   concentration_init=18).to(DEVICE)
            plain = (metric, proxy) == ("elk", "nivmf")
            compare(f"{metric}, {proxy} proxies" + ", the loop with a plain sampler and normaliser" * plain,
                    lambda: module(embeddings, labels),
                    lambda: (loop_elk if plain else loop_prob)(module, embeddings, labels),
                    proxy == "vmf" or metric == "loglik")
    module = prob_dml.ProbabilisticProxies(11318, D, temperature=1.0, concentration_init=18).to(DEVICE)
    embeddings = embeddings.detach().repeat(math.ceil(90 / B), 1)[:90].requires_grad_()
    labels, took = labels.repeat(math.ceil(90 / B))[:90], []

    def step():
        took.extend(seconds(lambda: module(embeddings, labels).backward(), repeats=1, warm=0))
    memory = peak(step) - 2 * 11318 * D * 4 / 2 ** 20                            # without the gradients that are kept
    line("elk, nivmf proxies, SOP's 11,318 classes, B = 90", took[0])
    if DEVICE.type == "cpu":
        line("... MiB above the parameters and their gradients", memory, unit="MiB")


# ------------------------------------------------------------------------------------------------ network and loading

def criterion_seconds(criterion, B, C, D):
    """Seconds of what a training loop adds to the network's own work: the losses, forward and backward, and Adam."""
    embeddings = (20 * torch.randn(B, D, device=DEVICE) / D ** 0.5).requires_grad_()
    adam = torch.optim.Adam(criterion.param_groups() or [embeddings])
    labels = torch.arange(B, device=DEVICE) // 2 % C

    def step():
        adam.zero_grad()
        sum(criterion.losses(embeddings, labels).values()).backward()
        adam.step()
    return seconds(step, repeats=10, warm=2)[0]


def bare_step(batch, size, autocast):
    """A bare ResNet50 step (forward, backward, Adam) on pictures in memory, to be called."""
    images = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    network = common.Network("resnet50", 512).to(DEVICE, memory_format=torch.channels_last).train()
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            embeddings = network(images)
        embeddings.float().square().mean().backward()
        adam.step()
    return step


def whole_step(folder, batch, size, steps):
    """Seconds of a whole step as `nir.py` runs it in its second epoch: loading and augmenting JPEG files, ProxyAnchor,
    flow, gradient shares, progress."""
    nir.main(["--dataset", "folder", "--data_root", f"{folder}/photos", "--weights", "none", "--epochs", "2",
              "--batch_size", str(batch), "--image_size", str(size), "--embed_dim", "512", "--out", f"{folder}/run{batch}"])
    return float(list(csv.DictReader(open(f"{folder}/run{batch}/log.csv")))[1]["seconds"]) / steps


def jpeg(path, width=500, height=375):
    noise = (255 * torch.rand(30, 40, 3)).to(torch.uint8).numpy()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).save(path)


def worker_rate(images, count):
    """Images per second of one worker process of a DataLoader, from its first batch of 10 on."""
    sampler = [[i % len(images) for i in range(start, start + 10)] for start in range(0, count + 10, 10)]
    loader, arrived = torch.utils.data.DataLoader(images, batch_sampler=sampler, num_workers=1), []
    for _ in loader:
        arrived.append(time.perf_counter())
    return count / (arrived[-1] - arrived[0])


def loading(count, size=224):
    """A worker's images per second, beside those without a smaller decoding."""
    header(f"one worker of a DataLoader, {size} pixels", "every JPEG decoded in full (ratio: ours / reference)")
    with tempfile.TemporaryDirectory() as folder:
        for what, width, height, few in (("CUB-size", 500, 375, count), ("12-megapixel", 4000, 3000, count // 4)):
            jpeg(f"{folder}/{width}.jpg", width, height)
            for kind, transform in (("training", data.train_transform), ("test", data.test_transform)):
                images = data.Images(data.Split([f"{folder}/{width}.jpg"], torch.zeros(1), ["a"]), transform(size, "photo"))
                ours, reduction = worker_rate(images, few), data.reduction
                data.reduction = lambda *_: 1
                full, data.reduction = worker_rate(images, few), reduction
                print(f"{f'{kind}, {what} JPEG, {width} x {height}':64s} {ours:12.4g} {full:12.4g} {ours / full:8.2f}  images/s",
                      flush=True)


def network(batch, steps, size=224):
    step = bare_step(batch, size, autocast=DEVICE.type == "cuda")
    bare = seconds(step, repeats=steps)[0]
    header(f"training step, ResNet50, batch {batch}, {size} pixels, D = 512", "the bare network step")
    with tempfile.TemporaryDirectory() as folder:
        for c in range(batch):                     # half of the classes train: as many as a batch needs
            (Path(folder) / f"photos/{c:03d}").mkdir(parents=True)
            for i in range(2 * steps if c < batch // 2 else 2):
                jpeg(f"{folder}/photos/{c:03d}/{i}.jpg")
        out, sys.stdout = sys.stdout, sys.stderr                                 # the run's own lines are not the table's
        whole = whole_step(folder, batch, size, steps)
        sys.stdout = out
        line("bare step / whole step of nir.py with loading", bare, whole, note="here the ratio is what the rest costs")
        images = data.Images(data.load("folder", f"{folder}/photos")[0], data.train_transform(size, "photo"))
        rate = worker_rate(images, 60)
    line("network, images/s", batch / bare, unit="images/s", note=f"{batch / bare / rate:.2f} workers keep it busy")
    C = 100
    for what, criterion in (
            ("ProxyAnchor + NIR (proxies, flow, Adam)", nir.NIR(nir.ProxyAnchor(C, 512), 512)),
            ("EL-nivMF (proxies, concentrations, Adam)", prob_dml.Criterion(prob_dml.ProbabilisticProxies(C, 512))),
            ("EL-nivMF + ProxyAnchor", prob_dml.Criterion(prob_dml.ProbabilisticProxies(C, 512), proxyanchor_weight=5)),
            *((name, objectives.Objective(objectives.make_loss(name, C, 512, "class"),
                                          "distance" if name in objectives.MINED else None))
              for name in objectives.LOSSES)):
        took = criterion_seconds(criterion.to(DEVICE), batch, C, 512)
        line(what, took, note=f"{100 * took / bare:.2f} % of the bare step")
    embeddings, labels = torch.randn(112, 512, device=DEVICE), torch.arange(112, device=DEVICE) // 2
    for name, miner in objectives.MINERS.items():
        line(f"miner {name}, batch 112, D = 512", seconds(lambda: miner(embeddings, labels), repeats=20, warm=2)[0])
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        single = seconds(bare_step(batch, size, autocast=False), repeats=steps)[0]
        line("autocast against float32", bare, single)
        line("float32, GPU memory", torch.cuda.max_memory_allocated() / 2 ** 20, unit="MiB")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--quick", action="store_true", help="smaller sizes: two minutes on two cores")
    quick = p.parse_args().quick
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {threads} threads for the network"
    print(f"torch {torch.__version__}, {name}")
    torch.set_num_threads(1)
    retrieval(*((8000, 256) if quick else (60502, 1024)))
    losses(*((30, 50, 128) if quick else ()), repeats=3 if quick else 7)
    loading(*((40,) if quick else (400,)))
    torch.set_num_threads(threads)
    network(*((8, 2) if quick else (90, 3)))
