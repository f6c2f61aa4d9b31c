"""Every picture: what it draws, that it can be written, and that it leaves matplotlib alone."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from normwear_fast import plots
from normwear_fast.errors import InputError, OutputError, UsageError

MODELS = ["normwear", "statistics", "random"]
TASKS = ["stress", "activity", "fatigue", "seizure", "hypertension", "hemoglobin"]
SCORES = np.array(
    [
        [0.83, 0.98, 0.74, 0.97, 0.62, 0.95],
        [0.79, 0.93, 0.69, 0.96, 0.60, 0.94],
        [0.70, 0.90, 0.66, np.nan, 0.55, 0.93],
    ]
)


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def figures():
    generator = random()
    probability = generator.dirichlet(np.ones(3), 60)
    truth = np.repeat([0, 1, 2], 20)
    probability[np.arange(60), truth] += 0.6
    probability /= probability.sum(axis=1, keepdims=True)
    signal = np.sin(np.arange(390) / 8) + 0.2 * generator.standard_normal((2, 390))
    relevance = generator.dirichlet(np.full(560, 0.1), 2)
    clouds = np.concatenate([generator.standard_normal((40, 8)) + 3 * k for k in range(3)])
    scalogram = np.cumsum(generator.standard_normal((3, 387, 65)), axis=1)
    mask = generator.random(559) < 0.8
    classes = ["baseline", "stress", "amusement"]
    return {
        "radar": plots.radar(MODELS, TASKS, SCORES),
        "bars": plots.bars(MODELS, TASKS, SCORES, np.stack([SCORES - 0.04, SCORES + 0.02], -1)),
        "critical_difference": plots.critical_difference(
            ["a", "normwear", "statistics", "random", "chronos"],
            [1.4, 1.9, 2.8, 4.1, 4.8],
            1.4,
            tasks=18,
        ),
        "confusion": plots.confusion(truth, probability.argmax(axis=1), classes),
        "roc": plots.roc(truth, probability, classes),
        "pca": plots.embedding_map(clouds, ["ECG"] * 40 + ["PPG"] * 40 + ["EEG"] * 40),
        "tsne": plots.embedding_map(clouds, ["a"] * 60 + ["b"] * 60, method="tsne"),
        "relevance": plots.relevance(
            [plots.RelevanceWindow(0.0, signal, relevance, "yes")],
            ["ECG", "PPG"],
            title="Stressed?",
        ),
        "scalogram": plots.scalogram_mask(scalogram, mask),
    }


@pytest.fixture(scope="module")
def drawn():
    return figures()


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [item.get_text() for item in figure.findobj(Text) if item.get_text()]


def test_every_picture_can_be_written(drawn, tmp_path):
    for name, figure in drawn.items():
        png = plots.save(figure, tmp_path / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5_000, name
        svg = plots.save(figure, tmp_path / "deep" / f"{name}.svg")
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_same_picture_is_the_same_bytes(tmp_path):
    for number in (1, 2):
        figure = plots.bars(MODELS, TASKS, SCORES)
        plots.save(figure, tmp_path / f"{number}.svg")
        plots.save(figure, tmp_path / f"{number}.png")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_bars_and_radar_show_the_scores(drawn):
    heights = [bar.get_height() for bar in drawn["bars"].axes[0].patches]
    np.testing.assert_allclose(heights, 100 * SCORES.ravel())
    lines = drawn["radar"].axes[0].get_lines()
    np.testing.assert_allclose(lines[0].get_ydata(), np.append(SCORES[0], SCORES[0, 0]))
    for name in ("bars", "radar"):
        assert set(MODELS) | set(TASKS) <= set(texts(drawn[name]))


def test_critical_difference_joins_what_is_not_told_apart(drawn):
    axes = drawn["critical_difference"].axes[0]
    joins = [line.get_xdata() for line in axes.get_lines() if line.get_linewidth() == 4]
    found = sorted((round(x[0] + 0.02, 2), round(x[1] - 0.02, 2)) for x in joins)
    # 1.4, 1.9, 2.8 are within 1.4 of each other; 2.8 and 4.1; 4.1 and 4.8: no bar inside another.
    assert found == [(1.4, 2.8), (2.8, 4.1), (4.1, 4.8)]
    assert "critical difference 1.40 over 18 tasks" in texts(drawn["critical_difference"])


def test_roc_areas_are_the_auc():
    from sklearn.metrics import roc_auc_score

    generator = random()
    truth = generator.integers(2, size=80)
    score = np.round(0.3 * truth + generator.random(80), 1) / 2
    figure = plots.roc(truth, np.stack([1 - score, score], axis=1), ["no", "yes"])
    expected = roc_auc_score(truth, score)
    assert f"yes, area {expected:.3f}" in texts(figure)
    assert len(figure.axes[0].get_lines()) == 2  # the diagonal and one curve
    only = plots.roc(np.ones(5, int), np.full((5, 2), 0.5), ["no", "yes"])
    assert len(only.axes[0].get_lines()) == 1


def test_confusion_counts():
    figure = plots.confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]), ["a", "b", "c"])
    counts = [text.get_text() for text in figure.axes[0].texts]
    assert counts == ["1", "1", "0", "0", "1", "0", "0", "1", "0"]
    with pytest.raises(InputError, match="beyond the 2 named ones"):
        plots.confusion(np.array([2]), np.array([0]), ["a", "b"])


def test_pca_map_is_the_principal_plane(drawn):
    figure = drawn["pca"]
    clouds = [item.get_offsets() for item in figure.axes[0].collections]
    assert [len(cloud) for cloud in clouds] == [40, 40, 40]
    centres = [cloud[:, 0].mean() for cloud in clouds]
    assert centres == sorted(centres)  # apart along the first component, sign fixed
    again = figures()["pca"].axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(again, clouds[0])
    assert any("of variance" in text for text in texts(figure))


def test_relevance_stands_where_its_patch_does(drawn):
    tokens = np.full((1, 560), 0.5)
    tokens[0, 0] = 5  # [CLS] has no place in time
    tokens[0, 1 + 13 * 10 + 4] = 2
    window = plots.RelevanceWindow(12.0, np.zeros((1, 390)), tokens)
    figure = plots.relevance([window])
    (mesh,) = figure.axes[0].collections
    grid = mesh.get_array().reshape(13, 43)
    assert np.unravel_index(grid.argmax(), grid.shape) == (4, 10)
    assert grid[4, 10] == pytest.approx(2 / tokens.mean())
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges[10] == pytest.approx(12 + 90.5 / 65)
    assert {"ECG", "PPG", "Stressed?", "yes"} <= set(texts(drawn["relevance"]))
    with pytest.raises(InputError, match="tokens are right"):
        plots.relevance([plots.RelevanceWindow(0.0, np.zeros((1, 390)), np.zeros((1, 30)))])
    with pytest.raises(InputError, match="at least one"):
        plots.relevance([])


def test_the_mask_covers_its_patches():
    mask = np.zeros(559)
    mask[13 * 7 + 4] = 1  # time step 7, scale band 4
    figure = plots.scalogram_mask(random().standard_normal((3, 387, 65)), mask)
    cover = figure.axes[0].get_images()[1].get_array()
    assert np.argwhere(cover[..., 3] > 0).tolist() == [[4, 7]]
    assert figure.axes[0].get_images()[1].get_extent()[1] == pytest.approx(387 / 65)
    plain = plots.scalogram_mask(random().standard_normal((3, 387, 65)))
    assert len(plain.axes[0].get_images()) == 1
    with pytest.raises(InputError, match="mask"):
        plots.scalogram_mask(np.zeros((3, 387, 65)), np.zeros(10))


def test_input_of_another_shape_is_refused():
    with pytest.raises(InputError, match="three or more"):
        plots.radar(["a"], ["x", "y"], np.ones((1, 2)))
    with pytest.raises(InputError, match="2 models and 2 tasks"):
        plots.bars(["a", "b"], ["x", "y"], np.ones((1, 2)))
    with pytest.raises(InputError, match="two or more of both"):
        plots.critical_difference(["a"], [1.0], 1.0, tasks=3)
    with pytest.raises(InputError, match="with n groups"):
        plots.embedding_map(np.ones((4, 2)), ["a"] * 3)
    with pytest.raises(UsageError, match="pca or tsne"):
        plots.embedding_map(np.ones((4, 2)), ["a"] * 4, method="umap")  # type: ignore[arg-type]


def test_saving_says_what_is_wrong(tmp_path):
    figure = plots.bars(["a"], ["x"], np.ones((1, 1)))
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        plots.save(figure, tmp_path / "x.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        plots.save(figure, tmp_path / "file" / "x.png")
    with pytest.raises(OutputError, match="cannot be written"):
        plots.html_report(tmp_path / "file" / "x.html", "x", [])


def test_the_report_is_self_contained_and_escaped(tmp_path):
    figure = plots.bars(["a"], ["x"], np.ones((1, 1)))
    saved = plots.save(figure, tmp_path / "x.png")
    page = plots.html_report(
        tmp_path / "report.html",
        "<script>alert(1)</script>",
        [
            ('A & "B"', figure),
            ("saved", saved),
            ("table", [{"model": "<b>", "score": "1"}, {"model": "c", "extra": "2"}]),
            ("text", "1 < 2"),
        ],
    ).read_text()
    assert "<script" not in page
    assert "&lt;b&gt;" in page
    assert "1 &lt; 2" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2
    assert base64.b64decode(pictures[0]) == base64.b64decode(pictures[1]) == saved.read_bytes()
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_matplotlib_is_loaded_late_and_left_as_it_was():
    code = (
        "import sys; import normwear_fast.plots as p; assert 'matplotlib' not in sys.modules;"
        "import matplotlib; before = dict(matplotlib.rcParams);"
        "p.save(p.bars(['a'], ['x'], [[0.5]]), sys.argv[1]);"
        "assert dict(matplotlib.rcParams) == before;"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "try: p.bars(['a'], ['x'], [[0.5]])\n"
        "except p.UsageError as error: assert 'normwear-fast[plots]' in str(error)\n"
        "else: raise AssertionError"
    )
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        done = subprocess.run(
            [sys.executable, "-c", code, file.name], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
