"""smnist and scifar from parquet files like the hub's, and the errors when files or the hub are missing."""

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from programs import go_offline

from hf_compressm.data import load_task
from hf_compressm.data.images import CIFAR10, MNIST, SPLITS
from hf_compressm.data.sources import find_splits

TRAIN, TEST = 100, 7


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def draw(source, n, seed=0):
    """n random images of a source's shape, with labels 0, 1, ..., 9, 0, ..."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *source.shape), dtype=np.uint8), np.arange(n) % 10


def write_split(file, source, images, labels, column=None, embed=True):
    """One parquet file like the hub's; without `embed`, as tools other than `datasets` write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    column = column or source.image_column
    label = ClassLabel(names=list(source.label_names)) if embed else Value("int64")
    features = Features({column: Image(), "label": label})
    rows = {column: [PILImage.fromarray(image) for image in images], "label": labels}
    data = Dataset.from_dict(rows, features=features)
    table = data.data.table
    parquet.write_table(table if embed else table.replace_schema_metadata(None), file)


def write_folder(folder, source, **options):
    train, test = draw(source, TRAIN), draw(source, TEST, seed=1)
    half = TRAIN // 2
    write_split(folder / "train-00000-of-00002.parquet", source, train[0][:half], train[1][:half], **options)
    write_split(folder / "train-00001-of-00002.parquet", source, train[0][half:], train[1][half:], **options)
    write_split(folder / "test-00000-of-00001.parquet", source, *test, **options)
    return train, test


@pytest.mark.parametrize("name, source, nested", [("smnist", MNIST, "mnist"), ("scifar", CIFAR10, "plain_text")])
def test_hub_layout_is_read_pixel_by_pixel(tmp_path, name, source, nested):
    _, (test_images, test_labels) = write_folder(tmp_path / "data" / nested, source)
    task = load_task(name, data_dir=tmp_path / "data")

    assert (len(task.train), len(task.validation), len(task.test)) == (TRAIN - 10, 10, TEST)
    channels = len(source.mean)
    assert task.model_kwargs["num_channels"] == channels
    assert list(task.model_kwargs["id2label"].values()) == list(source.label_names)

    batch = task.test[:]
    expected = (test_images / 255).reshape(TEST, -1, channels)
    expected = (expected - np.array(source.mean)) / np.array(source.std)
    assert batch["input_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    np.testing.assert_allclose(batch["input_values"].numpy(), expected, atol=1e-5)  # float32, values below 5
    np.testing.assert_array_equal(batch["labels"].numpy(), test_labels)

    # train and validation share out the train files
    rows = torch.cat([task.train[:]["input_values"], task.validation[:]["input_values"]])
    assert len(torch.unique(rows, dim=0)) == TRAIN
    assert task.validation[:]["labels"].sort().values.tolist() == list(range(10))


def test_files_without_the_image_feature_and_in_the_folder_itself(tmp_path):
    _, (test_images, _) = write_folder(tmp_path / "flat", MNIST, embed=False)
    item = load_task("smnist", data_dir=str(tmp_path / "flat")).test[2]
    assert item["input_values"].shape == (784, 1) and item["labels"] == 2
    pixels = item["input_values"].flatten() * MNIST.std[0] + MNIST.mean[0]
    np.testing.assert_array_equal(np.rint(pixels.numpy() * 255), test_images[2].flatten())


# Black and white under the constants that most published work on these data sets uses.
@pytest.mark.parametrize(
    "name, source, black, white",
    [
        ("smnist", MNIST, [-0.42421], [2.82149]),
        ("scifar", CIFAR10, [-1.98947, -1.98029, -1.70680], [2.05911, 2.12649, 2.11583]),
    ],
)
def test_normalisation_constants(tmp_path, name, source, black, white):
    write_folder(tmp_path / "data", source)
    images = np.zeros((2, *source.shape), dtype=np.uint8)
    images[1] = 255
    write_split(tmp_path / "data" / "test-00000-of-00001.parquet", source, images, np.arange(2))
    values = load_task(name, data_dir=tmp_path / "data").test[:]["input_values"]
    np.testing.assert_allclose(values[:, 0].numpy(), [black, white], atol=1e-5)


def test_validation_is_the_same_in_every_load(tmp_path):
    write_folder(tmp_path / "data", MNIST)
    first, second = (load_task("smnist", data_dir=tmp_path / "data", seed=seed) for seed in (0, 1))
    assert torch.equal(first.validation[:]["input_values"], second.validation[:]["input_values"])


def test_missing_split_says_which_were_found(tmp_path):
    write_split(tmp_path / "data" / "mnist" / "train-00000-of-00001.parquet", MNIST, *draw(MNIST, 3))
    with pytest.raises(ValueError, match=r"test-\*\.parquet.*found \['train'\] in .*mnist"):
        load_task("smnist", data_dir=tmp_path / "data")


def test_empty_and_absent_folders(tmp_path):
    with pytest.raises(ValueError, match="found no such files"):
        find_splits(tmp_path, SPLITS)
    with pytest.raises(FileNotFoundError, match="not a folder.*nowhere"):
        find_splits(tmp_path / "nowhere", SPLITS)


def test_two_data_sets_below_one_folder_are_not_guessed_between(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            (tmp_path / folder / f"{split}.parquet").touch()
    with pytest.raises(ValueError, match="a, b; pass one of them"):
        find_splits(tmp_path, SPLITS)
    assert find_splits(tmp_path / "a", SPLITS)["train"] == [tmp_path / "a" / "train.parquet"]


def test_files_in_the_folder_itself_come_first(tmp_path):
    for folder in (tmp_path, tmp_path / "older"):
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            (folder / f"{split}.parquet").touch()
    assert find_splits(tmp_path, SPLITS)["test"] == [tmp_path / "test.parquet"]


def test_missing_column_says_which_were_found(tmp_path):
    write_folder(tmp_path / "data", MNIST, column="picture")
    with pytest.raises(ValueError, match=r"'train'.*no column \['image'\].*\['picture', 'label'\]"):
        load_task("smnist", data_dir=tmp_path / "data")


def test_images_of_another_size_are_refused(tmp_path):
    write_folder(tmp_path / "data", CIFAR10, column="image")
    with pytest.raises(ValueError, match=r"shape \(28, 28\).*found \(32, 32, 3\)"):
        load_task("smnist", data_dir=tmp_path / "data")


def test_too_few_images_for_a_validation_split(tmp_path):
    for split in ("train", "test"):
        write_split(tmp_path / "data" / f"{split}.parquet", MNIST, *draw(MNIST, 10))
    with pytest.raises(ValueError, match=r"10 items are too few.*\[10, 0\]"):
        load_task("smnist", data_dir=tmp_path / "data")


def test_a_damaged_file_is_told(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(b"PAR1" + b"x" * 40)
    with pytest.raises(ValueError, match=f"the files of {tmp_path} cannot be read as parquet: "):
        load_task("smnist", data_dir=tmp_path)


def test_labels_out_of_range_are_refused(tmp_path):
    images, labels = draw(MNIST, 4)
    for split, shift in (("train", 0), ("test", 8)):
        write_split(tmp_path / "data" / f"{split}.parquet", MNIST, images, labels + shift, embed=False)
    with pytest.raises(ValueError, match=r"'test'.*\[0, 9\], found \[8, 11\]"):
        load_task("smnist", data_dir=tmp_path / "data")


def test_without_the_hub_the_error_says_what_to_do(tmp_path, monkeypatch):
    go_offline(monkeypatch, tmp_path)
    with pytest.raises(ConnectionError) as raised:
        load_task("smnist")
    assert raised.value.__cause__ is not None
    for part in ("ylecun/mnist", str(tmp_path), "--data_dir", "train-*.parquet", "'image'", "HF_HOME"):
        assert part in str(raised.value)
