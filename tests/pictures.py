"""The pictures of README.md and RESULTS.md, drawn from finished runs.

    python tests/pictures.py                            all, into the folder .pictures
    python tests/pictures.py three_spheres curves       some

Nothing is trained here. The runs are those of tests/experiments.py, in the folder $RUNS (default:
runs). Where one is missing, a sentence says which command makes it.

All is drawn at twice its size and then halved, which makes lines and letters smooth. So a length
in this file counts half pixels.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import experiments
import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

import common
import data
import evaluate
import prob_dml
from data import UserError

FOLDER = Path(__file__).parents[1] / ".pictures"
WIDTH = 2880
MARGIN = 80
LETTERS = 72        # the size of the letters
LINE = 100          # the height of a line of text

BLUE, RED, GREEN, PURPLE = "#1f77b4", "#d62728", "#2ca02c", "#9467bd"
ORANGE, TEAL, BROWN, GREY = "#ff7f0e", "#17a0b0", "#8c564b", "#777777"

# ------------------------------------------------------------------------- what pictures share


def sheet(height):
    """A white picture, and the pen to draw on it."""
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(LETTERS)
    return picture, pen


def write(path, picture):
    """Halve a picture and write it as a PNG of 256 colours, which is small."""
    half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    with data.clear_errors(f"writing {path}", "see to it that its folder can be written"):
        half.quantize(256, kmeans=1).save(path, format="png", optimize=True)


def say(pen, place, text, anchor="lm"):
    """Write a text; lm means that `place` is the middle of its left end."""
    pen.text(place, text, "black", anchor=anchor)


def paste_drawing(picture, pixels, place, scale):
    """Put a drawing of toy, (32, 32), into a picture, enlarged by whole pixels."""
    drawing = Image.fromarray(pixels)
    side = scale * len(pixels)
    picture.paste(drawing.resize((side, side), Image.Resampling.NEAREST), place)


def mixed(colour, part, other="white"):
    """`part` of a colour and the rest of another: (red, green, blue)."""
    first, second = ImageColor.getrgb(colour), ImageColor.getrgb(other)
    return tuple(round(part * a + (1 - part) * b) for a, b in zip(first, second))


def axes(pen, box, x_ticks, y_ticks, scale=np.array):
    """Draw a grid; returns place(x, y), which gives the point of two numbers in the picture.

    box: left, top, right, bottom. Ticks are {number: text}, from one end of the axis to the other.
    scale: np.log for a logarithmic axis of y.
    """
    left, top, right, bottom = box
    x_ends = min(x_ticks), max(x_ticks)
    y_ends = scale([min(y_ticks), max(y_ticks)])

    def place(x, y):
        return np.interp(x, x_ends, (left, right)), np.interp(scale(y), y_ends, (bottom, top))

    for y, text in y_ticks.items():
        _, row = place(x_ends[0], y)
        pen.line([left, row, right, row], "#dddddd", 4)
        say(pen, (left - 30, row), text, "rm")
    for x, text in x_ticks.items():
        column = np.interp(x, x_ends, (left, right))
        pen.line([column, bottom, column, bottom + 16], GREY, 4)
        say(pen, (column, bottom + 66), text, "mm")
    return place


def line(pen, points, colour, width=16):
    pen.line(points, colour, width, joint="curve")


def dashed_line(pen, ends, colour):
    """A dashed line between two points of the same height."""
    (left, row), (right, _) = ends
    for x in np.arange(left, right, 60):
        pen.line([x, row, min(x + 36, right), row], colour, 8)


def legend(pen, left, top, entries):
    """A line of text for each (text, colour, function that draws a line), its line before it."""
    for i, (text, colour, draw) in enumerate(entries):
        row = top + i * LINE
        draw(pen, [(left, row), (left + 110, row)], colour)
        say(pen, (left + 150, row), text)


def finished(stage, group, seed=0):
    """The folder of a run of tests/experiments.py. Raises UserError where it is not finished."""
    folder = experiments.RUNS / stage / f"{group}-seed{seed}"
    if not (folder / "results.json").exists():
        raise UserError(f"{folder} is missing or not finished: make it with "
                        f"python tests/experiments.py {stage}")
    return folder


def columns(stage, group, column):
    """A column of log.csv, (seeds, epochs), of the seeds that are finished: at least one."""
    seeds, _ = experiments.STAGES[stage][group]
    folders = [experiments.RUNS / stage / f"{group}-seed{seed}" for seed in range(seeds)]
    runs = [evaluate.read_run(f) for f in folders if (f / "results.json").exists()]
    if not runs:
        finished(stage, group)          # which raises the error
    epochs = range(1, runs[0].epochs + 1)
    return np.array([[run.numbers[f"{column}@{epoch}"] for epoch in epochs] for run in runs])


def trained(stage, group):
    """(training split, test split, function that embeds a split, state of the criterion).

    The run's last epoch counts, its first seed.
    """
    checkpoint = common.load_checkpoint(finished(stage, group) / "last.pt", "checkpoint")
    args = argparse.Namespace(**checkpoint["args"])
    network = common.build_network(args, checkpoint)
    train, _, test = data.load_splits(args, download=False)

    def embed(split):
        return common.embed(network, split, args, torch.device("cpu"))

    return train, test, embed, checkpoint["criterion"]


# --------------------------------------------------------------------------------- three spheres

SPHERES = {"points": "ProxyNCA", "nir": "ProxyNCA + NIR", "nivmf": "EL-nivMF"}
RADIUS = 450

# The classes' colours, and that of the sphere.
DOZEN = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#22b8d8",
    "#f032e6", "#8a5a20", "#808000", "#000075", "#1f8a80", "#d8a800",
)
BALL = "#f3f3f3"


def draw_three_spheres():
    """The training drawings of a dozen of toy's classes, embedded with D = 3 by three runs."""
    picture, pen = sheet(1640)
    first_means = None
    for i, (group, title) in enumerate(SPHERES.items()):
        train, _, embed, state = trained("spheres", group)
        embeddings = F.normalize(embed(train))                                      # (N, 3)
        name = "proxies.proxies" if group == "nivmf" else "proxy_loss.proxies"
        proxies = F.normalize(state[name])                                          # (C, 3)

        # The middle of the first sphere's class means is turned to the viewer, the class means of
        # the others to those of the first.
        means = [embeddings[train.labels == c].mean(0) for c in range(len(proxies))]
        means = F.normalize(torch.stack(means))
        if first_means is None:
            rotation = rotation_onto(means.mean(0, keepdim=True), torch.tensor([[0.0, 0, 1]]))
            first_means = means @ rotation
        else:
            rotation = rotation_onto(means, first_means)

        centre = (480 + 960 * i, 600)
        say(pen, (centre[0], 70), title, "mm")
        pen.circle(centre, RADIUS, BALL, "#999999", 5)
        draw_side(pen, centre, embeddings @ rotation, train.labels, proxies @ rotation, front=False)
        if group == "nivmf":
            seen = sphere_points(2 * RADIUS) @ rotation.T           # as the network has it
            draw_densities(picture, centre, seen, proxies, state["proxies.concentrations"])
        draw_side(pen, centre, embeddings @ rotation, train.labels, proxies @ rotation, front=True)

    draw_key(picture, pen, train)
    return picture


def rotation_onto(points, targets):
    """The rotation or reflection R (3, 3) that brings points @ R closest to targets (C, 3).

    It is the solution of the orthogonal Procrustes problem.
    """
    U, _, Vt = torch.linalg.svd(points.T @ targets)
    return U @ Vt


def sphere_points(size):
    """Unit vectors (size, size, 3) of the front half, as it is seen; nan around the circle."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    return torch.stack([x, y, (1 - x ** 2 - y ** 2).sqrt()], dim=2)


def draw_side(pen, centre, embeddings, labels, proxies, front):
    """Dots for the embeddings, stars for the proxies, of the front or, pale, of the far side."""
    strength = 1 if front else 0.3
    colours = [mixed(colour, strength, BALL) for colour in DOZEN]
    rim = "black" if front else "#aaaaaa"

    def seen(points):
        for i in ((points[:, 2] >= 0) == front).nonzero().flatten().tolist():
            x, y, _ = points[i].tolist()
            yield i, (centre[0] + RADIUS * x, centre[1] - RADIUS * y)

    for i, place in seen(embeddings):
        pen.circle(place, 11, colours[labels[i]])
    for c, place in seen(proxies):
        draw_star(pen, place, 40, colours[c], rim)


def draw_star(pen, place, radius, colour, rim):
    corners = []
    for i in range(10):
        length = radius if i % 2 == 0 else 0.45 * radius
        angle = np.pi * i / 5
        corners.append((place[0] + length * np.sin(angle), place[1] - length * np.cos(angle)))
    pen.polygon(corners, colour, rim, 6)


def draw_densities(picture, centre, points, mu, K):
    """For each class the region, among the points, that holds half of its nivMF."""
    levels = half_of_mass(lambda z: prob_dml.nivmf_log_prob(z, mu, K))
    inside = prob_dml.nivmf_log_prob(points, mu, K) >= levels       # (size, size, C)
    inside = inside.permute(2, 0, 1).float()
    near_outside = F.max_pool2d(1 - inside, 13, stride=1, padding=6)
    tint = inside * (40 + 215 * near_outside)                       # 255 at the region's rim
    left, top = centre[0] - RADIUS, centre[1] - RADIUS
    for c, colour in enumerate(DOZEN):
        mask = Image.fromarray(tint[c].byte().numpy())
        picture.paste(colour, (left, top, left + 2 * RADIUS, top + 2 * RADIUS), mask)


def half_of_mass(log_density, tries=20_000):
    """The level (C,) of each density above which it has half of its probability.

    log_density takes unit vectors (N, 3) and gives (N, C).
    """
    generator = torch.Generator().manual_seed(0)
    uniform = F.normalize(torch.randn(tries, 3, generator=generator))
    highest_first = log_density(uniform).sort(dim=0, descending=True).values
    mass = highest_first.exp().cumsum(0)
    number_above = (mass < mass[-1] / 2).sum(0, keepdim=True)       # (1, C)
    return highest_first.gather(0, number_above)[0]


def draw_key(picture, pen, train):
    """What dots, stars and lines are; then the clearest drawing of each class in its colour."""
    row = 1150
    pen.circle((MARGIN + 20, row), 16, DOZEN[2])
    say(pen, (MARGIN + 70, row), "a drawing")
    draw_star(pen, (620, row), 44, DOZEN[2], "black")
    say(pen, (690, row), "the proxy of its class")
    pen.circle((1520, row), 20, mixed(DOZEN[2], 0.3))
    say(pen, (1570, row), "pale: on the far side")
    row += LINE + 10
    pen.ellipse([MARGIN - 10, row - 30, MARGIN + 100, row + 30], mixed(DOZEN[2], 0.2), DOZEN[2], 6)
    say(pen, (MARGIN + 140, row), "holds half of the probability that EL-nivMF gives the class")

    side, step = 6 * 32, 228
    for c, colour in enumerate(DOZEN):
        ambiguity = torch.where(train.labels == c, train.ambiguity, 2.0)
        clearest = int(ambiguity.argmin())
        left, top = MARGIN - 4 + c * step, 1370
        pen.rectangle([left, top, left + side + 23, top + side + 23], colour)
        paste_drawing(picture, train.images[clearest], (left + 12, top + 12), scale=6)


# --------------------------------------------------------------------------- norm and ambiguity


def draw_norm_ambiguity():
    """A class's drawings by their norm, and the error when those of low norm are rejected."""
    _, test, embed, _ = trained("toy-cells", "elk-nivmf")
    embeddings = embed(test)
    norms = embeddings.norm(dim=1)
    _, rejection = evaluate.uncertainty(embeddings, test.labels)

    # The class whose norms go with clarity as well as the median class's do.
    correlations = []
    for c in range(len(test.class_names)):
        members = test.labels == c
        clarity = 1 - test.ambiguity[members]
        correlations.append(scipy.stats.spearmanr(norms[members], clarity).statistic)
    middle_class = int(np.argsort(correlations)[len(correlations) // 2])
    members = (test.labels == middle_class).nonzero().flatten()
    members = members[norms[members].argsort()].tolist()

    picture, pen = sheet(2760)
    say(pen, (MARGIN, 80), "One character's twenty drawings, by the norm of their embedding")
    side, step = 7 * 32, 277
    for i, member in enumerate(members):
        left, top = MARGIN + i % 10 * step, 160 + i // 10 * 350
        paste_drawing(picture, test.images[member], (left, top), scale=7)
        pen.rectangle([left, top, left + side, top + side], outline=GREY, width=3)
        say(pen, (left + side // 2, top + side + 55), f"{norms[member]:.0f}", "mm")

    say(pen, (MARGIN, 1010), "How often a drawing that is kept is taken for another character")
    box = 280, 1110, WIDTH - 120, 2250
    highest = max(error for _, error in rejection)
    y_ticks = {y / 100: f"{y} %" for y in range(0, int(100 * highest) + 10, 10)}
    x_ticks = {x / 100: f"{x} %" for x in range(0, 101, 20)}
    place = axes(pen, box, x_ticks, y_ticks)
    say(pen, (1500, box[3] + 160), "of all test drawings are rejected", "mm")
    error_of_all = rejection[0][1]
    dashed_line(pen, [place(0, error_of_all), place(1, error_of_all)], GREY)
    line(pen, [place(*point) for point in rejection], BLUE)
    legend(pen, box[0], box[3] + 270, [("those of lowest norm first", BLUE, line),
                                       ("in random order", GREY, dashed_line)])
    return picture


# ----------------------------------------------------------------------- curves, and who pulls

NIR_GROUPS = {
    "anchor-official": ("ProxyAnchor with the official settings", PURPLE),
    "anchor-control": ("control: NIR's settings without NIR", BLUE),
    "anchor-exp": ("with NIR, exp: the official form, exp(-log p)", RED),
    "anchor-nll": ("with NIR, nll: the project page's form, -log p", GREEN),
}
NIVMF_GROUPS = {
    "g3-control": ("control: ProxyAnchor alone, EL-nivMF's settings", BLUE),
    "g3-exact": ("ProxyAnchor + EL-nivMF, exact density", ORANGE),
    "g3-official": ("ProxyAnchor + EL-nivMF, official form", TEAL),
    "cosine": ("cosine softmax, without ProxyAnchor", BROWN),
}
UNTRAINED = 76.5        # Recall@1 of the 1280 features: untrained.md of tests/experiments.py


def draw_panel(pen, top, title, groups, y_ticks, left=280, scale=np.array, level=None):
    """Curves by epoch of {(title, colour): values (seeds, epochs)}, and their legend.

    Pale lines are seeds, thick ones their means, geometric where scale is np.log. level: a number
    and its text, for a dashed line.
    """
    say(pen, (MARGIN, top + 80), title)
    box = left, top + 190, WIDTH - MARGIN, top + 1390
    epochs = max(values.shape[1] for values in groups.values())
    place = axes(pen, box, {x: str(x) for x in range(1, epochs + 1)}, y_ticks, scale)
    say(pen, ((box[0] + box[2]) // 2, box[3] + 160), "epoch", "mm")

    for (_, colour), values in groups.items():
        for row in values:
            line(pen, [place(1 + i, y) for i, y in enumerate(row)], mixed(colour, 0.4), width=5)
    entries = []
    for (text, colour), values in groups.items():
        mean = scipy.stats.gmean(values) if scale is np.log else values.mean(0)
        line(pen, [place(1 + i, y) for i, y in enumerate(mean)], colour)
        seeds = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
        entries.append((f"{text} ({seeds})", colour, line))
    if level:
        dashed_line(pen, [place(1, level[0]), place(epochs, level[0])], "black")
        entries.append((level[1], "black", dashed_line))
    legend(pen, left, box[3] + 280, entries)


def draw_who_pulls():
    """NIR's share of the gradient at the embeddings by epoch, in both forms, on half of CUB."""
    groups = {}
    for group in ("anchor-nll", "anchor-exp"):
        groups[NIR_GROUPS[group]] = columns("nir", group, "grad_share_nir")
    y_ticks = {1e-8: "1 in 100 million", 1e-6: "1 in a million", 1e-4: "1 in 10,000",
               1e-2: "1 %", 1: "100 %"}
    picture, pen = sheet(1900)
    title = "NIR's share of the gradient at the embeddings (half of CUB)"
    draw_panel(pen, 0, title, groups, y_ticks, left=660, scale=np.log)
    return picture


def draw_curves():
    """Recall@1 by epoch on half of CUB: a panel for NIR, one for EL-nivMF."""
    panels = {}
    for stage, titles in (("nir", NIR_GROUPS), ("nivmf", NIVMF_GROUPS)):
        for group, title in titles.items():
            try:
                recalls = 100 * columns(stage, group, "test_recall@1")
                panels.setdefault(stage, {})[title] = recalls
            except UserError as error:
                print(error)
    if not panels:
        raise UserError("no run on half of CUB is finished: python tests/experiments.py nir")

    recalls = np.concatenate([values for groups in panels.values() for values in groups.values()])
    y_ticks = {y: f"{y} %" for y in range(int(recalls.min()) // 2 * 2, int(recalls.max()) + 3, 2)}
    height = 2180
    picture, pen = sheet(height * len(panels))
    for i, (stage, groups) in enumerate(panels.items()):
        method = "NIR" if stage == "nir" else "EL-nivMF"
        draw_panel(pen, i * height, f"{method}: Recall@1 on half of CUB", groups, y_ticks,
                   level=(UNTRAINED, f"without any training: {UNTRAINED} %"))
    return picture


# ---------------------------------------------------------------------------------- similarities

VIRIDIS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
TITLES = {"elk": "expected likelihood", "bhattacharyya": "Bhattacharyya",
          "kl": "Kullback-Leibler", "loglik": "log-likelihood",
          "cosine": "cosine", "l2": "distance (L2)"}
WHAT_IS_WHERE = """Left: the density of a
vMF and of a non-isotropic
vMF on the sphere.

Below: how similar each
point of the plane is to the
vMF proxy at the cross.
The dot is the origin.

Yellow: most."""


def draw_similarities(size=880):
    """Two densities on the sphere, then six similarities in the plane of embeddings."""
    step = size + 240
    picture, pen = sheet(3 * step - 60)
    z = sphere_points(size)
    mu, kappa = F.normalize(torch.tensor([[0.1, 0.2, 0.97]])), torch.tensor(15.0)
    K = torch.tensor([[5.0, 15.0, 10.0]])
    fields = {
        "vMF": prob_dml.vmf_log_prob(z, mu[0], kappa).exp(),
        "non-isotropic vMF": prob_dml.nivmf_log_prob(z, mu, K)[..., 0].exp(),
        **similarities(size),
    }
    places = (0, 1, 3, 4, 5, 6, 7, 8)                       # the third is for words
    for place, (title, values) in zip(places, fields.items()):
        left = MARGIN + place % 3 * (size + 40)
        top = place // 3 * step + 130
        say(pen, (left + size // 2, top - 60), title, "mm")
        picture.paste(in_bands(values), (left, top))
        if place > 2:
            middle, proxy = left + size // 2, left + size * 3 // 4
            row = top + size // 2
            pen.circle((middle, row), 16, "white", "black", 5)
            pen.line([proxy - 36, row, proxy + 36, row], "black", 10)
            pen.line([proxy, row - 36, proxy, row + 36], "black", 10)
    left = MARGIN + 2 * (size + 40)
    pen.multiline_text((left + 20, 150), WHAT_IS_WHERE, "black", spacing=24)
    return picture


def similarities(size):
    """{title: values (size, size)}: each point of the plane beside a vMF proxy.

    The plane reaches from -30 to 30, the proxy has the direction (1, 0) and kappa = 15.
    """
    axis = torch.linspace(-30, 30, size)
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    embeddings = torch.stack([x, y], dim=2).view(-1, 2)
    values = {}
    for name, title in TITLES.items():
        function = prob_dml.SIMILARITIES[name]["vmf"]
        similarity = function(embeddings, torch.tensor([[1.0, 0.0]]), torch.tensor([15.0]))
        # As distances: cosine's bands are then equal angles, L2's equal lengths.
        values[title] = -(similarity.max() - similarity).sqrt().view(size, size)
    return values


def in_bands(values, bands=16):
    """A picture of values (H, W) in bands of one colour, whose rims are contours; nan is white."""
    values = values.numpy()
    level = (values - np.nanmin(values)) / np.nanmax(values - np.nanmin(values))
    band = np.floor(level * bands).clip(0, bands - 1) / bands * (len(VIRIDIS) - 1)
    channels = zip(*(ImageColor.getrgb(colour) for colour in VIRIDIS))
    pixels = [np.interp(band, range(len(VIRIDIS)), channel) for channel in channels]
    pixels = np.stack(pixels, axis=2)                               # (H, W, 3)
    pixels[np.isnan(values)] = 255
    return Image.fromarray(pixels.astype(np.uint8))


# ------------------------------------------------------------------------------------------ main

PICTURES = {
    "three_spheres": draw_three_spheres,
    "norm_ambiguity": draw_norm_ambiguity,
    "who_pulls": draw_who_pulls,
    "curves": draw_curves,
    "similarities": draw_similarities,
}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("names", nargs="*", metavar="NAME",
                   help=f"{', '.join(PICTURES)}; default: all")
    args = p.parse_args()
    for name in args.names:
        if name not in PICTURES:
            p.error(f"there is no picture {name}: choose {', '.join(PICTURES)}")
    for name in args.names or PICTURES:
        try:
            write(FOLDER / f"{name}.png", PICTURES[name]())
        except UserError as error:
            print(f"{name}.png is not drawn. {error}")


if __name__ == "__main__":
    common.command(main)
