import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from decathlon.shared.plots import PALETTE, save_figure, use_style


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        use_style()
        yield
    plt.close("all")


def draw():
    figure, axes = plt.subplots()
    for shift in range(3):
        axes.plot([0, 1, 2], [shift, shift + 1, shift], label=f"line {shift}")
    axes.set_title("Title")
    axes.legend()
    return figure


def test_a_figure_is_written_as_png_and_svg_and_closed(tmp_path):
    png, svg = save_figure(draw(), tmp_path / "figures" / "samples.v1")
    assert (png.name, svg.name) == ("samples.v1.png", "samples.v1.svg")
    assert plt.imread(png).shape[:2] == (600, 900)  # 6 x 4 inches at 150 dots an inch
    assert svg.read_text().lstrip().startswith("<?xml")
    assert len(list(png.parent.iterdir())) == 2
    assert plt.get_fignums() == []


def test_the_same_figure_gives_the_same_files(tmp_path):
    first, second = save_figure(draw(), tmp_path / "a"), save_figure(draw(), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_palette_is_the_color_cycle_and_has_no_twins():
    assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == list(PALETTE)
    assert len(set(PALETTE)) == len(PALETTE)
    assert mpl.get_backend().lower() == "agg"
