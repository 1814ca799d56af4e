"""What is measured of the demo model's pictures; the model itself is test_demo_model.py's."""

import pytest
import torch

from demo_model import world_score
from demo_model.world_questions import Question


@pytest.fixture
def question():
    """A ramp from left to right with a box hole in its middle."""
    photograph = torch.linspace(0, 1, 64).view(1, 64, 1).expand(64, 64, 3)
    hole = torch.zeros(64, 64)
    hole[16:48, 16:48] = 1
    return Question(photograph, photograph, hole, thing=0, style=0, alone=True)


def test_edges_of_the_photograph_itself_jump_once(question):
    photograph = question.photograph[None]
    assert world_score.edge_jump([question], photograph) == pytest.approx(1)
    hole = question.hole[None, ..., None]
    brighter = photograph + 0.1 * hole
    assert world_score.edge_jump([question], brighter) > 5
    elsewhere = photograph.clone()
    elsewhere[:, 30:34, 30:34] += 0.5  # well inside the hole
    assert world_score.edge_jump([question], elsewhere) == pytest.approx(1)


def test_pictures_differ_in_the_hole_alone(question):
    photograph = question.photograph[None]
    hole = question.hole[None, ..., None]
    other = photograph + 0.5 * (1 - hole) + 10 / 255 * hole
    assert world_score.difference([question], photograph, other) == pytest.approx(10, rel=1e-4)
