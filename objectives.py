"""The family of objectives in deep metric learning: ranking and classification losses.

The losses are those of T. Milbich's tutorial "The Family of Objective Functions in DML".
They are trained under the protocol of "Revisiting Training Strategies and Generalization
Performance in Deep Metric Learning" (Roth, Milbich, Sinha, Gupta, Ommer, Cohen, ICML 2020),
called "Revisiting" below. Each loss names its own paper.

In reading order: ranking losses; miners, which choose their triplets; classification
losses; the objective, which is a loss with its miner; the settings; main.

    python objectives.py --dataset toy --loss multisimilarity    built-in characters, minutes
    python objectives.py --dataset cub200 --loss margin          Revisiting's settings, a GPU

    symbol      name in the code
    e_i         row i of `embeddings` (B, D), as the network gives them
    z_i         row i of `z`, the same on the unit sphere: e_i / ||e_i||
    d_ij        `d`, the distance ||z_i - z_j||; in Lifted and GenLifted ||e_i - e_j||
    S_ij        `S`, the cosine similarity z_i . z_j
    P_i         row i of the mask `positives` (B, B): other images of the class of i
    N_i         row i of the mask `negatives` (B, B): images of other classes
    a, p, n     `a`, `p`, `n` (T,), the indices of T triplets: anchors, positives, negatives
    y           `labels` (B,), in 0 .. C-1
    W_c         row c of `proxies` (C, D), the learned vector of class c
    theta_ic    the angle between e_i and W_c; `cosine` (B, C) is its cosine
    [x]+        `F.relu`, the larger of x and 0
    alpha       the margin: `margin` in Triplet and Margin, else `alpha`; in MultiSimilarity a scale
    B, C, D, T  images of a batch, classes, dimensions, triplets

One step of the training, as `common.train_one_epoch` runs it. `network` is a backbone and one
linear layer, `objective`, which common.py calls criterion, an instance of `Objective`,
`optimizer` one Adam over both.

    embeddings = network(images)                        # e, not normalised, (B, D)
    losses = objective.losses(embeddings, labels)       # {"margin": scalar}
    optimizer.zero_grad()
    sum(losses.values()).backward()                     # other scripts have two losses
    optimizer.step()
"""
import math
import os

# Set before torch is imported: idle OpenMP threads sleep instead of slowing other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import nn

# full_precision: compute in float32, also under autocast.
from nir import check_at_least, check_batch, check_choice, check_positive, cosines, full_precision

# ------------------------------------------------------------------------------ ranking losses
# forward(embeddings (B, D), labels (B,)) gives the loss, a scalar. Triplet and Margin
# take the triplets of a miner as well, three index tensors (T,); the others see all pairs.
#
# A batch of one class, or of classes with one image each, has nothing to rank. Then the
# loss and its gradient are 0, except for GenLifted's penalty.
#
# Two copies of an image are at distance 0, where the square root has an infinite slope.
# norm() and cdist() take the gradient 0 there; the official codes add 1e-8 under the root.


def pair_masks(labels):
    """Say for each image which others of the batch are its positives and its negatives.

    labels (B,) -> positives, negatives: two masks (B, B). Entry (i, j) says whether j is
    in P_i, or in N_i.
    """
    same_class = labels.unsqueeze(0) == labels.unsqueeze(1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives = same_class & ~itself
    negatives = ~same_class
    return positives, negatives


class Ranking(nn.Module):
    """What the ranking losses share: L is the mean of summands, or 0 if there are none.

    Each loss below defines its `summands`: one for each triplet, pair or anchor, two for
    each triplet in Margin. A summand is never negative. One that is 0 has no gradient: it
    has nothing more to teach. forward and diagnostics take the arguments of `summands`;
    triplets are three tensors (T,) of indices a, p, n.

    Margin adds nu beta_a and divides by another number, and GenLifted adds a penalty. The loss
    is nan if an embedding or a parameter is not finite, which comparisons and miners may pass
    over.
    """

    num_classes = None                  # labels may be any integers, except in Margin

    @full_precision
    def forward(self, embeddings, labels, triplets=None):
        value = self.value(*self.check(embeddings, labels, triplets))
        for x in (embeddings, *self.parameters()):
            value = torch.where(x.isfinite().all(), value, math.nan)
        return value

    def check(self, embeddings, labels, triplets):
        """The arguments of `summands`. Raises ValueError for triplets of other shapes."""
        labels = check_batch(embeddings, labels, self.num_classes)
        if triplets is None:
            return embeddings, labels
        shapes = [tuple(index.shape) for index in triplets]
        if len(shapes) != 3 or shapes != [(len(triplets[0]),)] * 3:
            raise ValueError(f"triplets must be three index tensors (T,), not {shapes}")
        return embeddings, labels, [index.long() for index in triplets]

    def value(self, *batch):
        summands = self.summands(*batch)
        return summands.sum() / max(len(summands), 1)

    @full_precision
    def diagnostics(self, embeddings, labels, triplets=None):
        """For the log: the fraction of summands above 0, or nan if there are none."""
        active = self.summands(*self.check(embeddings, labels, triplets)) > 0
        return {"active": active.float().mean()}


class Triplet(Ranking):
    """Triplet loss: a positive is to be nearer to the anchor than a negative, by a margin.

        L = mean_(a,p,n)  [d_ap^2 - d_an^2 + margin]+

    The mean is over all triplets, those whose summand is 0 included. FaceNet (Schroff,
    Kalenichenko, Philbin, CVPR 2015); before it LMNN (Weinberger, Blitzer, Saul, NIPS
    2005).
    """

    def __init__(self, margin=0.2):
        super().__init__()
        self.margin = margin

    def summands(self, embeddings, labels, triplets):
        # The triplets' rows of z, (T, D) each.
        z_a, z_p, z_n = (F.normalize(embeddings)[index] for index in triplets)
        squared_ap = (z_a - z_p).square().sum(1)                  # (T,)
        squared_an = (z_a - z_n).square().sum(1)
        return F.relu(squared_ap - squared_an + self.margin)


class Margin(Ranking):
    """Margin loss: positives within a learned boundary beta, negatives beyond it.

        pull = [d_ap - beta_a + margin]+
        push = [beta_a - d_an + margin]+
        L    = sum_(a,p,n) (pull + push + nu beta_a) / num_active

    num_active is the number of pull > 0 plus the number of push > 0; L is 0 if that is 0. When
    easy summands reach 0 they no longer count, and L jumps up: compare L only together with
    `active`, the fraction of summands above 0, in the log.

    With granularity `class` beta is (C,), and beta_a belongs to the class of the anchor; with
    `global` beta is one number for all. (The tutorial's beta is the sum of a global, a class
    and an image term.)

    Wu, Manmatha, Smola, Kraehenbuehl, "Sampling Matters in Deep Embedding Learning",
    ICCV 2017; nu as in the authors' code.
    """

    def __init__(self, num_classes, margin=0.2, beta=1.2, nu=0.0, granularity="class"):
        super().__init__()
        shapes = {"global": (), "class": (num_classes,)}
        check_choice("granularity", granularity, shapes)
        check_at_least("margin", margin, 0)
        check_at_least("nu", nu, 0)
        if granularity == "class":
            self.num_classes = num_classes
        self.beta = nn.Parameter(torch.full(shapes[granularity], float(beta)))
        self.margin = margin
        self.nu = nu

    def boundaries(self, labels, triplets):
        """beta_a of each triplet, (T,)."""
        a, _, _ = triplets
        if self.beta.dim() == 0:
            return self.beta.expand(len(a))
        return self.beta[labels[a]]

    def summands(self, embeddings, labels, triplets):
        """pull and push of each triplet, (2, T)."""
        # The triplets' rows of z, (T, D) each.
        z_a, z_p, z_n = (F.normalize(embeddings)[index] for index in triplets)
        d_ap = (z_a - z_p).norm(dim=1)                            # (T,)
        d_an = (z_a - z_n).norm(dim=1)
        beta_a = self.boundaries(labels, triplets)
        pull = F.relu(d_ap - beta_a + self.margin)
        push = F.relu(beta_a - d_an + self.margin)
        return torch.stack([pull, push])

    def value(self, embeddings, labels, triplets):
        summands = self.summands(embeddings, labels, triplets)
        beta_a = self.boundaries(labels, triplets)
        total = summands.sum() + self.nu * beta_a.sum()
        num_active = (summands > 0).sum()
        return torch.where(num_active > 0, total / num_active.clamp(min=1), 0.0)

    def diagnostics(self, *batch):
        """For the log: the fraction of summands above 0, and the mean boundary."""
        values = super().diagnostics(*batch)
        values["boundary"] = self.beta.mean()
        return values


def unnormalised_distances(embeddings):
    """The distances ||e_i - e_j|| (B, B) of embeddings as they are, not on the sphere.

    cdist's usual way, a matrix product, is off by 1e-3 near 0 in float32, and by more for
    longer embeddings.
    """
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")


def masked_logsumexp(x, mask):
    """log sum_j exp(x_ij) over the columns j in row i of the mask, (B, B) -> (B,).

    A row without any column in the mask gives the lowest finite number. (The gradient of a
    logsumexp over -inf alone is nan.)
    """
    lowest = torch.finfo(x.dtype).min
    return x.masked_fill(~mask, lowest).logsumexp(1)


class Lifted(Ranking):
    """Lifted structure: each pair of a class against all negatives of both its images.

        J_ij = log(sum_{k in N_i} exp(alpha - d_ik) + sum_{l in N_j} exp(alpha - d_jl)) + d_ij
        L    = 1 / (2 |P|) sum_{(i,j) in P} [J_ij]+^2

    P holds all (i, j) with j in P_i, so each pair twice. Here d is between the
    embeddings e as they are, not on the sphere. The paper's penalty on the length of e
    is left out. Oh Song, Xiang, Jegelka, Savarese, CVPR 2016.
    """

    def __init__(self, alpha=1.0):
        super().__init__()
        self.alpha = alpha

    def summands(self, embeddings, labels):
        """[J_ij]+^2 / 2 of each pair in P, (|P|,)."""
        positives, negatives = pair_masks(labels)
        d = unnormalised_distances(embeddings)                    # (B, B)
        push = masked_logsumexp(self.alpha - d, negatives)        # (B,)
        push_of_both = torch.logaddexp(push.unsqueeze(0), push.unsqueeze(1))
        J = push_of_both + d                                      # (B, B)
        return F.relu(J[positives]).square() / 2


class GenLifted(Ranking):
    """Generalised lifted structure: all positives of an anchor against all its negatives.

        J_i = log sum_{p in P_i} exp(d_ip) + log sum_{n in N_i} exp(alpha - d_in)
        L   = mean_i [J_i]+  +  weight * mean_i ||e_i||

    The first mean is over the anchors that have a positive. d is as in Lifted. Hermans,
    Beyer, Leibe, "In Defense of the Triplet Loss", 2017. This is what Revisiting's
    tables call lifted.
    """

    def __init__(self, alpha=1.0, weight=0.005):
        super().__init__()
        check_at_least("weight", weight, 0)
        self.alpha = alpha
        self.weight = weight

    def summands(self, embeddings, labels):
        """[J_i]+ of each anchor that has a positive."""
        positives, negatives = pair_masks(labels)
        d = unnormalised_distances(embeddings)                    # (B, B)
        pull = masked_logsumexp(d, positives)                     # (B,)
        push = masked_logsumexp(self.alpha - d, negatives)
        J = pull + push
        has_positive = positives.any(1)
        return F.relu(J)[has_positive]

    def value(self, embeddings, labels):
        loss = super().value(embeddings, labels)
        length = embeddings.norm(dim=1).mean()
        return loss + self.weight * length


class MultiSimilarity(Ranking):
    """Multi-similarity: the hard pairs of each anchor, weighted by how hard they are.

        P_i' = {k in P_i: S_ik < max_{n in N_i} S_in + epsilon}
        N_i' = {k in N_i: S_ik > min_{p in P_i} S_ip - epsilon}
        L    = 1/B sum_i (1/alpha log(1 + sum_{P_i'} exp(-alpha (S_ik - threshold)))
                        + 1/beta  log(1 + sum_{N_i'} exp( beta  (S_ik - threshold))))

    threshold is the paper's lambda. P_i' and N_i' are empty together, and then the summand is
    0. Wang, Han, Huang, Dong, Scott, CVPR 2019; the settings are those of the authors' code,
    the paper has beta = 50 and threshold = 1.
    """

    def __init__(self, alpha=2.0, beta=40.0, threshold=0.5, epsilon=0.1):
        super().__init__()
        check_positive("alpha", alpha)
        check_positive("beta", beta)
        check_at_least("epsilon", epsilon, 0)
        self.alpha = alpha
        self.beta = beta
        self.threshold = threshold
        self.epsilon = epsilon

    def summands(self, embeddings, labels):
        """What is summed over i in L, (B,)."""
        positives, negatives = pair_masks(labels)
        z = F.normalize(embeddings)
        S = z @ z.T                                               # (B, B)

        # An anchor without negatives gets -inf, one without positives inf: no similarity
        # passes these, so it keeps no pair.
        nearest_negative = S.masked_fill(~negatives, -math.inf).amax(1, keepdim=True)  # (B, 1)
        farthest_positive = S.masked_fill(~positives, math.inf).amin(1, keepdim=True)
        hard_positives = positives & (S < nearest_negative + self.epsilon)
        hard_negatives = negatives & (S > farthest_positive - self.epsilon)

        # (B,) each: the logarithms of the two sums
        pull = masked_logsumexp(-self.alpha * (S - self.threshold), hard_positives)
        push = masked_logsumexp(self.beta * (S - self.threshold), hard_negatives)

        # log(1 + exp(x)) is logaddexp(x, 0).
        zero = S.new_zeros(())
        positive_term = torch.logaddexp(pull, zero) / self.alpha
        negative_term = torch.logaddexp(push, zero) / self.beta
        return positive_term + negative_term


# -------------------------------------------------------------------------------------- miners
# A miner chooses one triplet for each anchor that has a positive and a negative. It
# takes embeddings (B, D), labels (B,) and a random generator, None for torch's own, and
# returns the indices a, p, n of anchors, positives and negatives: three tensors (T,),
# where T may be 0. p is uniform in P_a; the miners differ in n.


@full_precision
def distances(embeddings):
    """d_ij (B, B), the distances on the unit sphere, without gradient.

    They come from one matrix product, which in float32 is off by 1e-3 near 0. That does
    not matter to any miner.
    """
    z = F.normalize(embeddings.detach())
    squared = 2 - 2 * z @ z.T
    return squared.clamp(min=1e-12).sqrt()


def sample_column(weights, generator):
    """Choose a column of each row at random, in proportion to the weights: (T, B) -> (T,).

    -log(u) / weight is an exponentially distributed time whose rate is the weight. A column is
    the fastest with a probability proportional to its weight. argmax takes the largest 1 /
    time, which is 0 for a weight of 0. A mask serves as weights 0 and 1. torch.multinomial does
    the same, but refuses T = 0.
    """
    u = torch.rand(weights.shape, device=weights.device, generator=generator)
    u.clamp_(min=torch.finfo(u.dtype).tiny)     # at 0, a chosen column would tie with weight 0
    inverse_time = weights / -u.log()
    return inverse_time.argmax(1)


def choose_positives(embeddings, labels, generator):
    """Take as anchors all images that have a positive and a negative; choose a positive for each.

    Returns a (T,), p (T,), and the anchors' rows N_a of the mask of negatives, (T, B).
    """
    labels = check_batch(embeddings, labels)
    positives, negatives = pair_masks(labels)
    has_triplet = positives.any(1) & negatives.any(1)
    a = has_triplet.nonzero().squeeze(1)
    p = sample_column(positives[a], generator)
    return a, p, negatives[a]


def mine_random(embeddings, labels, generator=None):
    """Any negative: n is uniform in N_a.

    Revisiting draws from the list of all triplets instead.
    """
    a, p, negatives = choose_positives(embeddings, labels, generator)
    n = sample_column(negatives, generator)
    return a, p, n


def mine_semihard(embeddings, labels, margin=0.2, generator=None):
    """A negative that is farther than the positive, but by less than the loss's margin.

    n is uniform in {n in N_a: d_ap < d_an < d_ap + margin}, or in N_a if that is empty. The
    idea is FaceNet's, which compares d^2. Here d is compared, as in Revisiting's code.
    """
    a, p, negatives = choose_positives(embeddings, labels, generator)
    d = distances(embeddings)[a]                                  # (T, B)
    d_ap = d.gather(1, p.unsqueeze(1))                            # (T, 1)
    semihard = negatives & (d > d_ap) & (d < d_ap + margin)
    has_semihard = semihard.any(1, keepdim=True)
    n = sample_column(torch.where(has_semihard, semihard, negatives), generator)
    return a, p, n


def mine_nearest(embeddings, labels, generator=None):
    """The nearest negative beyond the positive, which the tutorial calls semi-hard.

    n = argmin {d_an: n in N_a, d_an > d_ap}. If no negative is beyond the positive, n is the
    farthest in N_a.
    """
    a, p, negatives = choose_positives(embeddings, labels, generator)
    d = distances(embeddings)[a]                                  # (T, B)
    d_ap = d.gather(1, p.unsqueeze(1))                            # (T, 1)
    beyond = negatives & (d > d_ap)
    nearest = d.masked_fill(~beyond, math.inf).argmin(1)          # (T,)
    farthest = d.masked_fill(~negatives, -1).argmax(1)
    n = torch.where(beyond.any(1), nearest, farthest)
    return a, p, n


def distance_probabilities(embeddings, labels, lower=0.5, upper=1.4):
    """P(n | a), (B, B): negatives are chosen so that their distances spread evenly.

    The distance of two random points on the sphere in R^D has a density q that peaks
    near sqrt(2), so a uniform choice finds hardly any negative that is nearer. Dividing
    by q makes up for that:

        P(n | a) is proportional to 1 / q(max(d_an, lower)) if d_an < upper, else 0
        q(d)     is proportional to d^(D-2) (1 - d^2 / 4)^((D-3)/2)

    Beyond sqrt(2), 1 / q rises again. Hence `upper`, which Revisiting's code leaves out. If
    no negative is nearer than `upper`, the row is uniform over N_a; if there is no negative
    at all, it is zero. From the same paper as Margin.
    """
    labels = check_batch(embeddings, labels)
    _, negatives = pair_masks(labels)
    d = distances(embeddings)
    D = embeddings.shape[1]

    clipped = d.clamp(min=lower)
    # Unclamped, the logarithm of base is -inf at d = 2.
    base = (1 - clipped.square() / 4).clamp(min=1e-8)
    log_q = (D - 2) * clipped.log() + (D - 3) / 2 * base.log()

    inside = negatives & (d < upper)
    has_inside = inside.any(1, keepdim=True)
    candidates = torch.where(has_inside, inside, negatives)
    # Where no negative is inside, all candidates of the row weigh the same.
    log_weight = torch.where(inside, -log_q, 0.0)

    # At D = 512 the weights of a batch span e^370. softmax subtracts the maximum of each
    # row, so that no row vanishes. The last factor is for rows without any negative.
    lowest = torch.finfo(d.dtype).min
    return log_weight.masked_fill(~candidates, lowest).softmax(1) * candidates


def mine_distance(embeddings, labels, lower=0.5, upper=1.4, generator=None):
    """Negatives at all distances alike: n follows `distance_probabilities`."""
    a, p, _ = choose_positives(embeddings, labels, generator)
    probabilities = distance_probabilities(embeddings, labels, lower, upper)
    n = sample_column(probabilities[a], generator)
    return a, p, n


MINERS = {
    "random": mine_random,
    "semihard": mine_semihard,
    "nearest": mine_nearest,
    "distance": mine_distance,
}


# ----------------------------------------------------------------------- classification losses


class ClassVectors(nn.Module):
    """What the classification losses share: a softmax over classes with vectors W_c.

        L = mean_i -log softmax(logits_i)_y,      y the class of image i

    forward(embeddings (B, D), labels (B,)) gives L, a scalar. Each loss below defines
    `logits` (B, C). The W_c start at U(-1/sqrt(D), 1/sqrt(D)).
    """

    def __init__(self, num_classes, dim):
        super().__init__()
        bound = dim ** -0.5
        self.proxies = nn.Parameter(torch.empty(num_classes, dim).uniform_(-bound, bound))

    def cosine(self, embeddings):
        """cos(theta_ic), (B, C)."""
        return cosines(embeddings, self.proxies)

    @full_precision
    def forward(self, embeddings, labels):
        labels = check_batch(embeddings, labels, *self.proxies.shape)
        return F.cross_entropy(self.logits(embeddings, labels), labels)

    @full_precision
    def diagnostics(self, embeddings, labels):
        """For the log: the mean angle theta_iy to the own class, in degrees."""
        labels = check_batch(embeddings, labels, *self.proxies.shape)
        own_cosine = self.cosine(embeddings).gather(1, labels.unsqueeze(1))
        return {"own_angle": own_cosine.clamp(-1, 1).acos().rad2deg().mean()}


class Softmax(ClassVectors):
    """Softmax: the plain classifier, with nothing normalised and no bias.

        logits_ic = e_i . W_c
    """

    def logits(self, embeddings, labels):
        return embeddings @ self.proxies.T                        # (B, C)


class NormSoftmax(ClassVectors):
    """Normalised softmax: only the angles count, not the lengths of e_i and W_c.

        logits_ic = cos(theta_ic) / temperature

    Zhai, Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019,
    without the paper's layer norm.
    """

    def __init__(self, num_classes, dim, temperature=0.05):
        super().__init__(num_classes, dim)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def logits(self, embeddings, labels):
        return self.cosine(embeddings) / self.temperature


class SphereFace(ClassVectors):
    """SphereFace, or A-Softmax: a margin m that multiplies the angle to the own class.

        logits_ic = ||e_i|| cos(theta_ic)    for c other than y
        logits_iy = ||e_i|| psi(theta_iy)    for the own class
        psi(t)    = (-1)^k cos(m t) - 2k     for t in [k pi/m, (k+1) pi/m]

    psi falls steadily from 1 to 1 - 2m. With annealing, as the authors train it, the
    own class begins near its logit without margin:

        logits_iy = ||e_i|| (la cos(theta_iy) + psi(theta_iy)) / (1 + la)
        la        = max(5, 1000 / (1 + 0.12 step))

    la is the paper's lambda. With annealing, the buffer `step` counts the calls in training
    mode. Liu, Wen, Yu, Li, Raj, Song, CVPR 2017. (The tutorial's formula for
    "Sphere-/ArcFace" is ArcFace's.) Raises ValueError for a margin other than 1, 2, ...
    """

    def __init__(self, num_classes, dim, margin=4, annealing=False):
        super().__init__(num_classes, dim)
        if margin < 1 or margin != int(margin):
            raise ValueError(f"SphereFace multiplies angles by whole numbers, not by {margin}: "
                             "use a margin of 1, 2, ...")
        self.margin = int(margin)
        self.annealing = annealing
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def psi(self, c):
        """psi(t) as a function of c = cos(t).

        cos(m t) = T_m(c), Chebyshev's polynomial of degree m:

            T_0 = 1,      T_1 = c,      T_{j+1} = 2 c T_j - T_{j-1}

        Through acos(c), autograd would give nan at c = 1 and -1.
        """
        m = self.margin
        with torch.no_grad():
            t = c.clamp(-1, 1).acos()
            k = (m * t / math.pi).floor().clamp(max=m - 1)

        T_before, T = torch.ones_like(c), c
        for _ in range(m - 1):
            T_before, T = T, 2 * c * T - T_before
        sign = 1 - 2 * (k % 2)                                    # (-1)^k
        return sign * T - 2 * k

    def logits(self, embeddings, labels):
        own = labels.unsqueeze(1)                                 # (B, 1)
        cosine = self.cosine(embeddings)                          # (B, C)
        cos_y = cosine.gather(1, own)                             # (B, 1)
        target = self.psi(cos_y)

        if self.annealing:
            step = self.step.double()
            la = (1000 / (1 + 0.12 * step)).clamp(min=5)
            target = (la * cos_y + target) / (1 + la)
            if self.training:
                self.step += 1

        length = embeddings.norm(dim=1, keepdim=True)             # (B, 1)
        return length * cosine.scatter(1, own, target)


class ArcFace(ClassVectors):
    """ArcFace: a margin m that is added to the angle to the own class.

        logits_ic = scale cos(theta_ic)                  for c other than y
        logits_iy = scale cos(theta_iy + m)              if theta_iy <= pi - m
        logits_iy = scale (cos(theta_iy) - m sin(m))     beyond

    Past pi the cosine rises again, which would reward a larger angle. So the authors use the
    last line beyond pi - m. At the seam the logit jumps down, for m = 0.5 by 0.12 scale. The
    scale 16 is Revisiting's; the paper has 64. Deng, Guo, Xue, Zafeiriou, CVPR 2019.
    """

    def __init__(self, num_classes, dim, scale=16.0, margin=0.5):
        super().__init__(num_classes, dim)
        check_positive("scale", scale)
        check_at_least("margin", margin, 0, below=math.pi)
        self.scale = scale
        self.margin = margin

    def logits(self, embeddings, labels):
        m = self.margin
        own = labels.unsqueeze(1)                                 # (B, 1)
        cosine = self.cosine(embeddings)                          # (B, C)
        cos_y = cosine.gather(1, own)                             # (B, 1)

        # cos(theta + m) = cos(theta) cos(m) - sin(theta) sin(m). The clamp makes the sine's
        # gradient 0 at cos(theta) = 1 and -1, where the root's is infinite.
        sine_squared = (1 - cos_y) * (1 + cos_y)
        sine = sine_squared.clamp(min=1e-12).sqrt()
        shifted = cos_y * math.cos(m) - sine * math.sin(m)
        linear = cos_y - m * math.sin(m)
        target = torch.where(cos_y < -math.cos(m), linear, shifted)     # theta > pi - m
        return self.scale * cosine.scatter(1, own, target)


# ------------------------------------------------------------------------------- the objective

LOSSES = {
    "triplet": Triplet,
    "margin": Margin,
    "lifted": Lifted,
    "genlifted": GenLifted,
    "multisimilarity": MultiSimilarity,
    "softmax": Softmax,
    "normsoftmax": NormSoftmax,
    "sphereface": SphereFace,
    "arcface": ArcFace,
}

# The losses that take triplets, and those that have parameters of their own.
MINED = ("triplet", "margin")
LEARNED = ("margin", "softmax", "normsoftmax", "sphereface", "arcface")


def make_loss(name, num_classes, dim, granularity):
    """Make the loss `name` for `num_classes` classes and embeddings of dimension `dim`.

    `granularity` is for Margin alone.
    """
    check_choice("loss", name, LOSSES)
    if name == "margin":
        return Margin(num_classes, granularity=granularity)
    if name == "sphereface":
        return SphereFace(num_classes, dim, annealing=True)
    if issubclass(LOSSES[name], ClassVectors):
        return LOSSES[name](num_classes, dim)
    return LOSSES[name]()


class Objective(nn.Module):
    """A loss, together with the miner of its triplets if it takes any.

    miner is a name in MINERS, or None. loss_lr is the learning rate of the loss's parameters.
    """

    def __init__(self, loss, miner=None, loss_lr=5e-4):
        super().__init__()
        if miner is not None:
            check_choice("miner", miner, MINERS)
        self.loss = loss
        self.miner = miner
        self.loss_lr = loss_lr

    def mine(self, embeddings, labels):
        """Choose triplets a, p, n. The semi-hard miner uses the margin of the loss."""
        options = {}
        if self.miner == "semihard":
            options["margin"] = self.loss.margin
        return MINERS[self.miner](embeddings, labels, **options)

    def losses(self, embeddings, labels):
        """The loss and its name, {name: scalar}."""
        if self.miner is None:
            value = self.loss(embeddings, labels)
        else:
            triplets = self.mine(embeddings, labels)
            value = self.loss(embeddings, labels, triplets)
        name = type(self.loss).__name__.lower()         # as in LOSSES
        return {name: value}

    def param_groups(self):
        """The parameters of the loss, if any, as one group for Adam, without weight decay."""
        parameters = list(self.loss.parameters())
        if not parameters:
            return []
        return [{"params": parameters, "lr": self.loss_lr}]

    @torch.no_grad()
    def diagnostics(self, embeddings, labels):
        """For the log, {name: float}: what the loss reports, on triplets that are mined anew.

        With a miner there is also `mined_distance`, the mean d_an of the chosen
        negatives.
        """
        if self.miner is None:
            values = self.loss.diagnostics(embeddings, labels)
        else:
            triplets = self.mine(embeddings, labels)
            values = self.loss.diagnostics(embeddings, labels, triplets)
            a, _, n = triplets
            values["mined_distance"] = distances(embeddings)[a, n].mean()
        return {name: float(value) for name, value in values.items()}


# ---------------------------------------------------------------------------------- the settings
# The defaults of the options: a row for each loss, in three regimes. What is no option, a
# margin for example, is a default of the constructors above.
#
# `paper` is Revisiting's, with ImageNet's weights. `sop`, for Stanford Online Products, differs
# in the epochs and in normsoftmax's loss_lr. `scratch` is for a network that starts from
# nothing (--weights none). It is nir.py's except for lr and loss_lr, so that the results of the
# two scripts can be compared. lr is the best of three on validation classes (RESULTS.md): 3e-4
# for arcface, 3e-3 for the others.
#
# lr is the rate of backbone and embedding layer, loss_lr that of the loss's parameters. Softmax
# and SphereFace have no published loss_lr and use ArcFace's. Those of `scratch` are ours. In the
# first `warmup` epochs the backbone is not trained; after each of the epochs in lr_steps, all
# rates are multiplied by lr_gamma. `beta` is Margin's granularity.

COLUMNS = ("epochs", "batch_size", "lr", "lr_steps", "lr_gamma", "warmup",
           "loss_lr", "miner", "beta")
SETTINGS = {
    "paper": {
        # loss             epochs batch lr   steps     gamma warmup loss_lr miner      beta
        "triplet":         (150,   112,  1e-5, [],       0.1,  0,     None,   "distance", None),
        "margin":          (150,   112,  1e-5, [],       0.1,  0,     5e-4,   "distance", "class"),
        "lifted":          (150,   112,  1e-5, [],       0.1,  0,     None,   None,       None),
        "genlifted":       (150,   112,  1e-5, [],       0.1,  0,     None,   None,       None),
        "multisimilarity": (150,   112,  1e-5, [],       0.1,  0,     None,   None,       None),
        "softmax":         (150,   112,  1e-5, [],       0.1,  0,     5e-4,   None,       None),
        "normsoftmax":     (150,   112,  1e-5, [],       0.1,  0,     1e-5,   None,       None),
        "sphereface":      (150,   112,  1e-5, [],       0.1,  0,     5e-4,   None,       None),
        "arcface":         (150,   112,  1e-5, [],       0.1,  0,     5e-4,   None,       None),
    },
    "sop": {
        # loss             epochs batch lr   steps     gamma warmup loss_lr miner      beta
        "triplet":         (100,   112,  1e-5, [],       0.1,  0,     None,   "distance", None),
        "margin":          (100,   112,  1e-5, [],       0.1,  0,     5e-4,   "distance", "class"),
        "lifted":          (100,   112,  1e-5, [],       0.1,  0,     None,   None,       None),
        "genlifted":       (100,   112,  1e-5, [],       0.1,  0,     None,   None,       None),
        "multisimilarity": (100,   112,  1e-5, [],       0.1,  0,     None,   None,       None),
        "softmax":         (100,   112,  1e-5, [],       0.1,  0,     5e-4,   None,       None),
        "normsoftmax":     (100,   112,  1e-5, [],       0.1,  0,     2e-3,   None,       None),
        "sphereface":      (100,   112,  1e-5, [],       0.1,  0,     5e-4,   None,       None),
        "arcface":         (100,   112,  1e-5, [],       0.1,  0,     5e-4,   None,       None),
    },
    "scratch": {
        # loss             epochs batch lr   steps     gamma warmup loss_lr miner      beta
        "triplet":         (15,    90,   3e-3, [10, 13], 0.3,  0,     None,   "distance", None),
        "margin":          (15,    90,   3e-3, [10, 13], 0.3,  0,     3e-3,   "distance", "class"),
        "lifted":          (15,    90,   3e-3, [10, 13], 0.3,  0,     None,   None,       None),
        "genlifted":       (15,    90,   3e-3, [10, 13], 0.3,  0,     None,   None,       None),
        "multisimilarity": (15,    90,   3e-3, [10, 13], 0.3,  0,     None,   None,       None),
        "softmax":         (15,    90,   3e-3, [10, 13], 0.3,  0,     0.03,   None,       None),
        "normsoftmax":     (15,    90,   3e-3, [10, 13], 0.3,  0,     0.03,   None,       None),
        "sphereface":      (15,    90,   3e-3, [10, 13], 0.3,  0,     0.03,   None,       None),
        "arcface":         (15,    90,   3e-4, [10, 13], 0.3,  0,     3e-3,   None,       None),
    },
}


def preset(args):
    """The row of SETTINGS for a run, as a dictionary."""
    if args.weights == "none":
        regime = "scratch"
    elif args.dataset == "sop":
        regime = "sop"
    else:
        regime = "paper"
    rows = SETTINGS[regime]
    row = rows.get(args.loss, rows["softmax"])          # a loss of one's own takes softmax's
    return dict(zip(COLUMNS, row))


def fixed(args):
    """Constants of the loss and the miner that are no options, {"Margin.margin": 0.2, ...}."""
    # Not imported at the top, so that the losses can be borrowed without it.
    import common

    constants = common.defaults(LOSSES[args.loss])
    if args.loss == "margin":
        del constants["Margin.granularity"]  # --beta says it
    if args.loss == "sphereface":
        constants["SphereFace.annealing"] = True  # as make_loss sets it
    if args.miner == "distance":
        constants.update(common.defaults(distance_probabilities))
    return constants


def main(argv=None):
    import common

    parser = common.parser(__doc__)
    add = parser.add_argument_group("loss and miner").add_argument
    add("--loss", choices=LOSSES, default="margin",
        help="The loss to train with. Default: margin.")
    add("--miner", choices=MINERS,
        help="The miner that chooses the triplets of triplet and margin. Default: distance.")
    add("--beta", choices=("global", "class"),
        help="Boundaries of the margin loss: one for all classes, or one for each. "
             "Default: class.")
    add("--loss_lr", type=common.learning_rate,
        help="Learning rate of the boundaries or proxies. Default: the preset's.")
    args = common.parse(parser, preset, argv, fixed)

    applies_to = {"miner": MINED, "beta": ("margin",), "loss_lr": LEARNED}
    for option, losses in applies_to.items():
        if args.loss not in losses:
            run = f"--loss {args.loss}, only to {', '.join(losses)}"
            common.refuse(args, (option,), run)

    def make_criterion(num_classes):
        loss = make_loss(args.loss, num_classes, args.embed_dim, args.beta)
        return Objective(loss, args.miner, args.loss_lr)

    common.check_options(make_criterion)
    words = [args.dataset, args.loss, args.beta, args.miner, f"seed{args.seed}"]
    name = "-".join(word for word in words if word is not None)
    common.train(args, make_criterion, name)


if __name__ == "__main__":
    import common

    common.command(main)
