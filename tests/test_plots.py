import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from evolkv.models import ModelInfo
from evolkv.plots import budgets_heatmap
from evolkv.profile import BudgetProfile


def profile(budgets, name="model"):
    budgets = np.asarray(budgets)
    heads = budgets.shape[1] if budgets.ndim == 2 else 2
    return BudgetProfile.from_budgets(ModelInfo(name, len(budgets), heads, 8, 64, 4096, "0" * 16), budgets)


@pytest.mark.parametrize(
    "budgets",
    [
        [64] * 6,
        list(range(40, 70)),
        [[40, 900], [50, 60], [2000, 33]],
        np.random.default_rng(0).integers(33, 3000, (40, 8)),
        [[64, 65]],
    ],
    ids=["flat", "layers", "heads", "large", "single layer"],
)
def test_picture_is_wide_enough_to_read_and_not_blank(tmp_path, budgets):
    budgets_heatmap(profile(budgets), tmp_path / "b.png")
    picture = imread(tmp_path / "b.png")
    assert picture.shape[1] >= 1000
    assert len(np.unique(picture[..., 0])) > 10


def test_different_budgets_give_different_pictures(tmp_path):
    budgets_heatmap(profile([[40, 900], [50, 60]]), tmp_path / "a.png")
    budgets_heatmap(profile([[900, 40], [50, 60]]), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_names_with_signs_of_mathematics_are_drawn_as_they_are(tmp_path):
    budgets_heatmap(profile([64, 96], name=r"a$b_{c$\frac"), tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 0


def test_drawing_leaves_matplotlib_alone_and_replaces_the_picture(tmp_path):
    before = dict(matplotlib.rcParams)
    (tmp_path / "b.png").write_text("old")
    budgets_heatmap(profile([64, 96]), tmp_path / "b.png")
    assert dict(matplotlib.rcParams) == before
    assert imread(tmp_path / "b.png").size
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
