"""Images, what training makes of them, and what evaluations see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from experiments.objectives.classification import Classification
from experiments.objectives.evaluation import Sums
from experiments.tasks.sources import augmentations
from experiments.tasks.sources.image_sets import image_set
from experiments.training.task import Examples, Task, find_task

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
# Brighter from left to right and, in other colours, from top to bottom, with an edge.
RAMP = (np.indices((12, 16)).transpose(1, 2, 0) @ [[9, 2, 0], [3, 8, 12]]).astype(np.uint8)
RAMP[4:8, 5:9] += 40
AUGMENTED: dict[str, Any] = {
    "crop": "padded",
    "padding": 1,
    "flip": True,
    "rand_augment": (2, 9.0, 0.5),
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}


def make(**options: Any) -> Task:
    return find_task("image_classification", options)


def training(task: Task, seed: int = 0) -> Examples:
    examples = task.train(seed)
    assert isinstance(examples, Examples)
    return examples


def evaluated(task: Task, name: str = "test") -> Examples:
    scored = task.evaluation(name)
    assert isinstance(scored, Sums)
    return scored.examples


def seen(task: Task, index: int, epoch: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    return training(task, seed).seen(np.array([index]), np.array([epoch]))


def test_digits_are_images_in_minus_one_to_one_with_their_label():
    task = make()
    bundled: Any = load_digits()
    assert task.sizes == {"classes": 10, "channels": 1, "height": 8, "width": 8}
    batch = evaluated(task).fetch(np.arange(4))
    numbers = [0, 1, 10, 11]  # the first two of every ten
    want = np.floor(bundled.images[numbers] * 255 / 16) / 127.5 - 1
    np.testing.assert_allclose(batch["image"], want[..., None], atol=1e-6)
    np.testing.assert_array_equal(batch["labels"], bundled.target[numbers])
    assert batch["image"].dtype == np.float32 and batch["labels"].dtype == np.int32


def test_what_becomes_of_an_image_follows_from_seed_epoch_and_number_alone():
    task = make(**AUGMENTED)
    whole = training(task).seen(np.array([3, 7, 5]), np.array([2, 2, 2]))
    alone = seen(task, 7, 2)
    for name, array in alone.items():
        np.testing.assert_array_equal(array[0], whole[name][1])
    for other in (seen(task, 7, 3), seen(task, 7, 2, seed=1)):
        assert (other["image"] != alone["image"]).any()
    assert whole["labels"].shape == (3, 10)
    np.testing.assert_allclose(whole["labels"].sum(axis=1), 1, rtol=1e-6)
    plain = seen(make(), 7, 2)["image"]
    np.testing.assert_array_equal(plain, seen(make(), 7, 3, seed=1)["image"])


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_a_mixture_is_of_two_training_images_in_the_shares_of_its_labels(option):
    task = make(**{option: 1.0})
    examples = training(make())
    everything = examples.seen(np.arange(1257), np.zeros(1257, int))
    batch = training(task).seen(np.arange(20), np.zeros(20, int))
    for index, (image, labels) in enumerate(zip(batch["image"], batch["labels"], strict=True)):
        own, share = everything["image"][index], labels[everything["labels"][index]]
        assert len(np.flatnonzero(labels)) <= 2
        if not 0.05 < share < 0.95:
            continue
        if option == "mixup":
            other = (image - share * own) / (1 - share)
            apart = np.abs(everything["image"] - other).max(axis=(1, 2, 3))
            assert apart.min() < 1e-4
        else:
            changed = (image != own).any(axis=-1)
            assert changed.mean() <= 1 - share + 1e-6  # the rectangle, where the two differ


def test_evaluations_see_images_as_they_are_and_at_other_sizes():
    task = make(**AUGMENTED, label_smoothing=0.1, enlarged=(16,))
    plain = make()
    for name in ("validation", "test"):
        got, want = (evaluated(t, name).fetch(np.arange(3)) for t in (task, plain))
        np.testing.assert_array_equal(got["image"], want["image"])
    assert evaluated(task, "test_at_16").fetch(np.arange(2))["image"].shape == (2, 16, 16, 1)
    scored = task.evaluation("test")
    assert isinstance(scored, Sums)
    assert (task.objective, scored.objective) == (Classification(0.1), Classification())
    assert list(task.evaluations) == ["validation", "test", "test_at_16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "random"}, "crop must be one of 'none', 'padded', 'resized'; got 'random'"),
        ({"rand_augment": (2, 9)}, r"rand_augment must be \(\) or \(operations, magnitude, "),
        ({"grey": True}, "grey must be False for images without the channels"),
        ({"mixup": -1.0}, "mixup must be a finite number"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


class Photographs(tfds.core.GeneratorBasedBuilder):
    """Images of several sizes, in the splits that ImageNet has."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(10), "validation": self._generate_examples(4)}

    def _generate_examples(self, count: int) -> Any:
        for number in range(count):
            image = Image.fromarray(np.full((20 + number, 30, 3), 10 * number, np.uint8))
            yield number, {"image": image, "label": number % 3}


def test_photographs_of_any_size_are_cropped(tmp_path: Path):
    Photographs(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    where = {"dataset": "photographs", "data_dir": str(tmp_path), "test_split": "validation"}
    task = make(**where, size=8, crop="resized")
    batch = training(task).seen(np.arange(9), np.zeros(9, int))
    assert batch["image"].shape == (9, 8, 8, 3)
    np.testing.assert_allclose(batch["image"].std(axis=(1, 2, 3)), 0, atol=1e-6)
    assert evaluated(task).fetch(np.arange(4))["image"].shape == (4, 8, 8, 3)
    with pytest.raises(ValueError, match="must have images of one size for this task, or be"):
        make(**where)
    with pytest.raises(ValueError, match="must have the splits train and test; it has"):
        make(**where | {"test_split": "test"}, size=8)


def test_a_centre_crop_is_the_middle_seven_eighths():
    ramp = np.broadcast_to(np.arange(160, dtype=np.uint8)[None], (80, 160))
    got = augmentations.centre_crop(np.ascontiguousarray(ramp), 70, 70)
    np.testing.assert_allclose(got[5], 45 + np.arange(70), atol=1)


def test_a_padded_crop_moves_the_image():
    tops = set()
    for seed in range(30):
        got = augmentations.padded_crop(PIXELS, np.random.default_rng(seed), 2)
        padded = np.pad(PIXELS, ((2, 2), (2, 2), (0, 0)))
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if (padded[i : i + 12, j : j + 16] == got).all()
        ]
        assert places
        tops |= set(places)
    assert len(tops) > 10


@pytest.mark.parametrize("name", augmentations.OPERATIONS)
@pytest.mark.parametrize("pixels", [RAMP, RAMP[..., 0]])
def test_every_operation_keeps_shape_and_type_and_most_grow_with_their_level(name, pixels):
    operation = augmentations.OPERATIONS[name]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    changes = []
    for level in (0.0, 0.5, 1.0):
        got = np.asarray(operation(picture, level, 1.0))
        assert got.shape == pixels.shape and got.dtype == np.uint8
        changes.append(np.abs(got.astype(int) - pixels).mean())
    if name not in ("autocontrast", "equalize", "invert", "posterize") and pixels.ndim == 3:
        assert changes[0] < 1 and changes[2] > changes[1] > 0


def test_erasing_makes_a_rectangle_noise_as_often_as_it_is_told():
    image = np.zeros((32, 32, 3), np.float32)
    found = [augmentations.erased(image, np.random.default_rng(i), 0.25) for i in range(400)]
    share = np.mean([(each != 0).any() for each in found])
    assert 0.18 < share < 0.32
    noise = np.concatenate([each[each != 0] for each in found])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    areas = [(each != 0).all(axis=-1).mean() for each in found if each.any()]
    assert min(areas) > 0.01 and max(areas) < 0.4
    assert (image == 0).all()


def test_the_sets_of_both_tasks_are_one():
    assert image_set("digits", "", False).sha256 == make().provenance["images_sha256"]
