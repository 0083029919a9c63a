"""The pictures show what they say: where points are seen, contours, similarities."""
import experiments
import pictures
import pytest
import torch
import torch.nn.functional as F

import prob_dml
from data import UserError


def test_a_rotation_or_reflection_is_undone():
    generator = torch.Generator().manual_seed(0)
    means = F.normalize(torch.randn(12, 3, generator=generator))
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    for turned in (means @ rotation, -means @ rotation):
        found = pictures.rotation_onto(turned, means)
        torch.testing.assert_close(turned @ found, means)


def test_a_single_direction_is_turned_to_the_front():
    middle, front = torch.tensor([[0.3, -0.2, 0.1]]), torch.tensor([[0.0, 0, 1]])
    turned = middle @ pictures.rotation_onto(middle, front)
    torch.testing.assert_close(F.normalize(turned), front)


def test_the_sphere_is_seen_from_the_third_axis_with_the_second_upwards():
    points = pictures.sphere_points(21)
    torch.testing.assert_close(points[10, 10], torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(points[5, 10], torch.tensor([0.0, 0.5, 0.75 ** 0.5]))
    torch.testing.assert_close(points[10, 15], torch.tensor([0.5, 0, 0.75 ** 0.5]))
    assert points[0, 0].isnan().any()


def test_half_of_a_vmfs_samples_are_inside_its_contour():
    mu, kappa = torch.tensor([0.0, 0, 1]), torch.tensor(10.0)
    K = torch.full((1, 3), 10.0)
    level = pictures.half_of_mass(lambda z: prob_dml.nivmf_log_prob(z, mu[None], K))
    samples = prob_dml.sample_vmf(mu[None], kappa[None], 10_000, torch.Generator().manual_seed(0))
    inside = prob_dml.vmf_log_prob(samples, mu, kappa) > level
    assert inside.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_similarities_show_which_depend_on_the_norm():
    falls = {"expected likelihood", "Bhattacharyya", "Kullback-Leibler", "distance (L2)"}
    for title, values in pictures.similarities(41).items():
        through_proxy = values[20]
        away_from_proxy = through_proxy[:20]
        assert (away_from_proxy.std() > 0.05) == (title in falls)
        assert through_proxy[35] > through_proxy[5]


def test_a_missing_run_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    for draw in (pictures.draw_three_spheres, pictures.draw_norm_ambiguity,
                 pictures.draw_who_pulls, pictures.draw_curves):
        with pytest.raises(UserError, match="python tests/experiments.py [a-z-]+$"):
            draw()
