"""The experiments behind RESULTS.md: their commands, and what they give as tables.

    python tests/experiments.py STAGE [STAGE ...]      run what is missing, then write the tables
    python tests/experiments.py --list                 print all commands

Two runs at a time, each on one thread. A run that is there is skipped, one that was stopped is
resumed. Runs, kept features and tables lie in the folder $RUNS (default: runs). Where it is
started, `cub_half` (half of CUB200-2011, RESULTS.md says which), `efficientnet_lite0.pth` (its
ImageNet weights) and `omniglot` have to be found.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import pretrained
import torch

import common
import data
import evaluate

RUNS = Path(os.environ.get("RUNS", "runs"))

# ------------------------------------------------------------------------------- the experiments
# {stage: {group: (seeds, command line)}}. The first group of a stage is the one to which the
# others' differences are shown. What is not said is the preset's.

CUB = ("--dataset cub200 --data_root cub_half --weights efficientnet_lite0.pth --workers 0 "
       "--device cpu ")
SHORT = CUB + "--epochs 15 --lr 1e-4 --lr_steps 10 13 --lr_gamma 0.3 "
NIR = "tests/pretrained.py nir.py " + SHORT
NIVMF = "tests/pretrained.py prob_dml.py " + SHORT
# The control has NIR's proxy_weight, proxy_lr and warmup.
CONTROL = "--nir_weight 0 --proxy_weight 0.0075 --proxy_lr 0.04 --warmup 1 "
# A tenth of the weight that ProxyAnchor takes.
NLL = "--nir_form nll --nir_weight 7.5e-6 "

# The ablation as published. The preset of EL-nivMF is that of the main runs, so the ablation's
# row is given as options.
ABLATION = "tests/pretrained.py prob_dml.py " + CUB + "--embed_dim 512 "
ELK = ("--batch_size 106 --epochs 50 --lr_steps --proxy_lr 0.05 --concentration_lr 0.5 "
       "--temperature_lr 0.005 --temperature 1 --concentration_init 50 --norm_multiplier 150 "
       "--samples 10 ")

TOY = "--dataset toy --workers 0 --device cpu "
OMNIGLOT = ("--dataset folder --data_root omniglot --arch conv4 --image_size 32 --embed_dim 64 "
            "--workers 0 --device cpu ")
CELLS = ("elk/nivmf", "elk/vmf", "bhattacharyya/nivmf", "bhattacharyya/vmf", "kl/nivmf", "kl/vmf",
         "loglik/nivmf", "loglik/vmf", "cosine/vmf", "l2/vmf")
FAMILY = ("triplet", "margin", "lifted", "genlifted", "multisimilarity", "softmax",
          "normsoftmax", "sphereface", "arcface")

# A dozen of toy's classes on the sphere, for a picture: the others are held out. ProxyNCA, because
# ProxyAnchor, tried at the default rates, drew all embeddings to one point. Rates and NIR's weight
# were chosen by the training classes. EL-nivMF, whose proxies start at the class means, was good
# after fewer epochs.
SPHERES = TOY + "--embed_dim 3 --val_fraction 0.88 --lr 3e-3 "
PROXYNCA = ("nir.py " + SPHERES + "--loss proxynca --epochs 150 --lr_steps 100 130 "
            "--proxy_lr 0.1 ")


def nir_beside(loss):
    return {
        f"{loss}-control": (3, f"{NIR}{CONTROL}--loss {loss}"),
        f"{loss}-exp": (3, f"{NIR}--loss {loss}"),
        f"{loss}-nll": (3, f"{NIR}{NLL}--loss {loss}"),
    }


def nir_from_scratch(dataset, seeds, name="anchor", options=""):
    return {
        name: (seeds, f"nir.py {dataset}{options} --nir_weight 0"),
        f"{name}-nir": (seeds, f"nir.py {dataset}{options}"),
    }


def cells_from_scratch(dataset):
    groups = {}
    for cell in CELLS:
        metric, proxy = cell.split("/")
        groups[f"{metric}-{proxy}"] = (3, f"prob_dml.py {dataset} --metric {metric} "
                                          f"--proxy {proxy}")
    return groups


def family_from_scratch(dataset):
    # ProxyAnchor at the rate of the others.
    anchor = f"nir.py {dataset} --nir_weight 0 --lr 3e-3 --proxy_lr 0.03"
    groups = {"anchor": (3, anchor)}
    for loss in FAMILY:
        groups[loss] = (3, f"objectives.py {dataset} --loss {loss}")
    return groups


STAGES = {
    "nir": {
        "anchor-control": (5, NIR + CONTROL),
        "anchor-official": (5, NIR + "--nir_weight 0"),
        "anchor-exp": (5, NIR),
        "anchor-nll": (5, NIR + "--nir_form nll --nir_weight 7.5e-5"),
        "anchor-positions": (3, NIR + CONTROL + "--loss proxyanchor-positions"),
    },
    # The control trains as EL-nivMF does: its first weights and proxies, its rates. But EL-nivMF's
    # term has a millionth of its share: ProxyAnchor's weight and weight decay are a million times
    # as large, and Adam does not see a loss's scale.
    #
    # "plain" is ProxyAnchor in the usual network. There a proxy of length sqrt(128) / 8 turns by
    # 0.0118 as far as one of length 6 by 0.05.
    "nivmf": {
        "g3-control": (5, NIVMF + "--proxyanchor_weight 3e6 --weight_decay 400"),
        "g3-plain": (5, NIR + "--nir_weight 0 --proxy_weight 3 --batch_size 64 "
                        "--proxy_lr 0.0118"),
        "g3-exact": (5, NIVMF + "--proxyanchor_weight 3"),
        "g3-official": (5, NIVMF + "--proxyanchor_weight 3 --form official"),
        "cosine": (5, NIVMF + "--metric cosine --batch_size 64"),
    },
    "ablation": {
        "cosine": (3, ABLATION + "--metric cosine"),
        "l2": (3, ABLATION + "--metric l2"),
        "elk-nivmf-exact": (3, ABLATION + ELK),
        "elk-nivmf-official": (3, ABLATION + ELK + "--form official"),
        "elk-vmf": (3, ABLATION + "--metric elk --proxy vmf"),
        "elk-vmf-50": (3, ABLATION + "--metric elk --proxy vmf --concentration_init 50"),
        "loglik-nivmf-official": (3, ABLATION + "--metric loglik --form official"),
        "loglik-vmf": (3, ABLATION + "--metric loglik --proxy vmf"),
    },
    "proxynca": nir_beside("proxynca"),
    "softtriple": nir_beside("softtriple"),
    "spheres": {
        "points": (1, PROXYNCA + "--nir_weight 0"),
        "nir": (1, PROXYNCA + "--nir_weight 0.03"),
        "nivmf": (1, "prob_dml.py " + SPHERES + "--epochs 60 --lr_steps 40 52 --proxy_lr 1 "
                     "--temperature 1 --norm_multiplier 10 --samples 50"),
    },
    "toy-nir": nir_from_scratch(TOY, 5),
    "toy-cells": cells_from_scratch(TOY),
    "toy-family": family_from_scratch(TOY),
    "omniglot-nir": nir_from_scratch(OMNIGLOT, 3),
    "omniglot-proxynca": nir_from_scratch(OMNIGLOT, 3, "proxynca", "--loss proxynca"),
    "omniglot-softtriple": nir_from_scratch(OMNIGLOT, 3, "softtriple", "--loss softtriple"),
    "omniglot-cells": cells_from_scratch(OMNIGLOT),
    "omniglot-family": family_from_scratch(OMNIGLOT),
}


# The groups' names in the tables, where they are not plain.
WORDS = {
    "anchor": "ProxyAnchor",
    "anchor-nir": "ProxyAnchor + NIR",
    "anchor-control": "control: NIR's settings, no NIR",
    "anchor-official": "ProxyAnchor, official settings",
    "anchor-exp": "ProxyAnchor + NIR, `exp`",
    "anchor-nll": "ProxyAnchor + NIR, `nll`",
    "anchor-positions": "control, mean over positions",
    "g3-control": "control: ProxyAnchor alone",
    "g3-plain": "ProxyAnchor alone, usual network",
    "g3-exact": "ProxyAnchor + EL-nivMF, `exact`",
    "g3-official": "ProxyAnchor + EL-nivMF, `official`",
    "cosine": "cosine softmax",
    "l2": "L2",
    "elk-nivmf-exact": "EL-nivMF, `exact`",
    "elk-nivmf-official": "EL-nivMF, `official`",
    "elk-vmf": "ELK, vMF proxies",
    "elk-vmf-50": "ELK, vMF proxies, EL-nivMF's settings",
    "loglik-nivmf-official": "log-likelihood, nivMF, `official`",
    "loglik-vmf": "log-likelihood, vMF",
    "proxynca": "ProxyNCA",
    "proxynca-nir": "ProxyNCA + NIR",
    "softtriple": "SoftTriple",
    "softtriple-nir": "SoftTriple + NIR",
    "proxynca-control": "control: NIR's settings, no NIR",
    "proxynca-exp": "ProxyNCA + NIR, `exp`",
    "proxynca-nll": "ProxyNCA + NIR, `nll`",
    "softtriple-control": "control: NIR's settings, no NIR",
    "softtriple-exp": "SoftTriple + NIR, `exp`",
    "softtriple-nll": "SoftTriple + NIR, `nll`",
}
STRUCTURE = ("uniformity", "spectral_decay", "density", "concentration_variance")


def runs_of(stage):
    """The runs of a stage, (folder, command line), seed by seed, so that pairs come early."""
    groups = STAGES[stage]
    most = max(seeds for seeds, _ in groups.values())
    for seed in range(most):
        for name, (seeds, command) in groups.items():
            if seed < seeds:
                folder = RUNS / stage / f"{name}-seed{seed}"
                words = [*command.split(), "--seed", str(seed), "--out", str(folder)]
                yield folder, " ".join(words)


def run(folder, command):
    """Train a run to its end, unless it is there. Its output goes to the file FOLDER.txt."""
    if (folder / "results.json").exists():
        return
    if (folder / "last.pt").exists():
        words = command.split()
        scripts = [word for word in words if word.endswith(".py")]
        command = f"{' '.join(scripts)} --resume {folder / 'last.pt'}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(command, flush=True)
    with open(f"{folder}.txt", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command.split()], stdout=log, stderr=log,
                              env=environment)
    if done.returncode:
        print(f"failed: {folder}.txt says why", flush=True)


# ------------------------------------------------------------------------ without any training


def untrained(seeds=5):
    """A table: half of CUB's test classes, embedded without any training, as Markdown.

    First by the network's 1280 features, then behind a random linear layer as a run starts with.
    """
    _, test = data.load("cub200", "cub_half")
    args = argparse.Namespace(arch=pretrained.ARCH, embed_dim=1280, image_size=128,
                              pooling="average", augment="photo", workers=0,
                              weights="efficientnet_lite0.pth")
    network = common.build_network(args)
    torch.nn.init.eye_(network.embedding.weight)
    torch.nn.init.zeros_(network.embedding.bias)
    features = common.embed(network, test, args, torch.device("cpu"))

    rows = {"1280 features": [features]}
    for dim in (128, 512):
        rows[f"random layer, D = {dim}"] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            with torch.no_grad():
                rows[f"random layer, D = {dim}"].append(torch.nn.Linear(1280, dim)(features))

    names = ("recall@1", "map@r", "nmi")
    lines = ["|  | n | " + " | ".join(names) + " |", "| --- |" + " ---: |" * (1 + len(names))]
    for title, embeddings in rows.items():
        metrics = [evaluate.all_metrics(e, test.labels, (1,)) for e in embeddings]
        cells = [title, str(len(embeddings))]
        for name in names:
            cells.append(evaluate.format_metric(name, [values[name] for values in metrics]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------ main


def write_tables(stage):
    """Compare the stage's finished runs. $RUNS/STAGE.md gets results, structure and commands."""
    folders = [folder for folder, _ in runs_of(stage) if (folder / "results.json").exists()]
    if not folders or stage == "spheres":       # whose runs are for a picture, and not alike
        return
    groups = evaluate.read_groups(folders)
    commands, results = evaluate.compare(groups, paired=True).split("\n|", 1)
    _, structure = evaluate.compare(groups, STRUCTURE).split("\n|", 1)
    text = f"|{results}\n|{structure}\n{commands}"
    for group, words in WORDS.items():
        text = text.replace(f"| {group} |", f"| {words} |")
    common.save_file(RUNS / f"{stage}.md", text)
    print(text)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"untrained, {', '.join(STAGES)}")
    p.add_argument("--list", action="store_true", help="print all commands instead")
    args = p.parse_args()
    for stage in args.stages:
        if stage not in ("untrained", *STAGES):
            p.error(f"there is no stage {stage}: choose untrained, {', '.join(STAGES)}")
    if args.list:
        for stage in STAGES:
            for _, command in runs_of(stage):
                print(f"python {command}")
        return

    for stage in args.stages:
        if stage == "untrained":
            common.save_file(RUNS / "untrained.md", untrained())
            continue
        # The first run alone, because it makes the features that the others take.
        first, *others = runs_of(stage)
        run(*first)
        with ThreadPoolExecutor(2) as pool:
            for folder, command in others:
                pool.submit(run, folder, command)
        write_tables(stage)


if __name__ == "__main__":
    common.command(main)
