"""pathfinder: pixels, labels and splits from files like the release's, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_compressm.data import load_task

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 32, 32), dtype=np.uint8)


def write(root, images=PIXELS, line="imgs/{part} sample_{n}.png {n} {label} 1.8 2.0", files=3):
    """Images of a number that the first pixel says, a third of them connected, in metadata files 0, 1 and 10."""
    place = root / "curv_contour_length_14"
    (place / "metadata").mkdir(parents=True)
    for part, numbers in zip((0, 1, 10), np.array_split(np.arange(len(images)), files), strict=True):
        (place / "imgs" / str(part)).mkdir(parents=True)
        for n in numbers:
            Image.fromarray(images[n]).save(place / "imgs" / str(part) / f"sample_{n}.png")
        lines = [line.format(part=part, n=n, label=int(n % 3 == 0)) for n in numbers]
        (place / "metadata" / f"{part}.npy").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("below, given", [("", ""), ("pathfinder32", ""), ("", "curv_contour_length_14")])
def test_pixels_and_labels(tmp_path, below, given):
    write(tmp_path / below)
    task = load_task("pathfinder", data_dir=tmp_path / given)
    found = []
    for split, size in ((task.train, 48), (task.validation, 6), (task.test, 6)):
        values, labels = split[:]["input_values"], split[:]["labels"]
        assert values.shape == (size, 1024, 1) and values.dtype == torch.float32
        assert labels.sum() == size // 3
        pixels = torch.round((values + 1) * 127.5).byte().numpy().reshape(-1, 32, 32)
        numbers = [int(np.flatnonzero((image == PIXELS).all((1, 2)))[0]) for image in pixels]
        assert labels.tolist() == [int(number % 3 == 0) for number in numbers]
        found += numbers
    assert sorted(found) == list(range(60))
    assert task.model_kwargs["num_labels"] == 2 and task.problem == "sequence_classification"


def test_splits_are_fixed(tmp_path):
    write(tmp_path)
    first, second = (load_task("pathfinder", data_dir=tmp_path, seed=seed) for seed in (0, 1))
    assert torch.equal(first.test[:]["input_values"], second.test[:]["input_values"])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"line": "imgs/{part} sample_{n}.png"}, ValueError, r"metadata/0.npy, line 1: expected columns.*sample_0"),
        ({"line": "imgs/{part} sample_{n}.png 0 yes"}, ValueError, "line 1: expected columns of text"),
        ({"line": "imgs/{part} sample_{n}.png 0 7"}, ValueError, r"labels must lie in \[0, 1\], found \[7, 7\]"),
        ({"line": "imgs/{part} other_{n}.png 0 1"}, FileNotFoundError, "other_0.png"),
        ({"images": PIXELS[:, :16]}, ValueError, r"sample_0.png: images must have shape \(32, 32\).*found \(16, 32\)"),
    ],
)
def test_malformed_files_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load_task("pathfinder", data_dir=write(tmp_path, **changes))


def test_it_needs_its_files(tmp_path):
    with pytest.raises(ValueError, match="'pathfinder' needs --data_dir FOLDER with curv_contour_length_14/metadata"):
        load_task("pathfinder")
    with pytest.raises(ValueError, match="data_dir needs curv_contour_length_14/metadata.*pathfinder32"):
        load_task("pathfinder", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_task("pathfinder", data_dir=tmp_path / "nowhere")
