"""Images find their masks by name, and what does not pair is told before anything is written."""

import io

import numpy as np
import pytest
from PIL import Image

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data.join import join
from mim.data.label_map import decode_label_map
from mim.data.make import make
from mim.data.parts import Part
from mim.data.shards import Dataset, inspect, read_lock
from tests.tiny import picture, write_tar

SIZE = (20, 30)


def mask(i, classes=4, size=SIZE):
    """A PNG of random classes, and the classes."""
    values = np.random.default_rng(i).integers(0, classes, size, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue(), values


def write(folder, names, data):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data(i))
    return folder


def pair(root, names=("a/x.jpg", "a/y.jpg", "b/x.jpg"), masks=None):
    """Folders of images and of masks; those of the same number belong together."""
    masks = [name.replace(".jpg", ".png") for name in names] if masks is None else masks
    return write(root / "images", names, picture), write(root / "masks", masks, lambda i: mask(i)[0])


def stored(path):
    """Key -> (image, label map) of a dataset."""
    dataset = Dataset.open(path)
    samples = [dataset.read(*dataset.locate(i), label_map=True) for i in range(len(dataset))]
    return {s.key.partition("/")[2]: (bytes(s.image), bytes(s.label_map)) for s in samples}


def made(root, images, masks, **options):
    return make(images, root / "out", masks=masks, workers=1, **options).path


def test_masks_lie_beside_their_images_byte_for_byte(tmp_path):
    images, masks = pair(tmp_path)
    found = stored(made(tmp_path, images, masks))
    assert found == {key: (picture(i), mask(i)[0]) for i, key in enumerate(("a/x", "a/y", "b/x"))}


def test_the_lock_names_member_classes_and_pixels_of_each(tmp_path):
    images, masks = pair(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("sky\nroad\ncar\ntree\ncow\n")
    lock = read_lock(made(tmp_path, images, masks, classes=str(names)))
    values = np.stack([mask(i)[1] for i in range(3)])
    assert lock["schema"]["members"]["label_map"] == ["seg.png"]
    assert lock["schema"]["pixel_classes"] == ["sky", "road", "car", "tree", "cow"]
    assert lock["statistics"]["pixel_counts"] == np.bincount(values.ravel(), minlength=5).tolist()
    assert lock["statistics"]["ignored_pixels"] == 0
    assert inspect(tmp_path / "out")["pixel_classes"]["cow"] == 0


def test_without_names_the_classes_are_the_numbers_that_occur_in_either_split(tmp_path):
    names = [f"{i}.jpg" for i in range(12)]
    images = write(tmp_path / "images", names, picture)
    masks = write(tmp_path / "masks", [f"{i}.png" for i in range(12)], lambda i: mask(i, classes=2 + (i == 3) * 9)[0])
    report = make(images, tmp_path / "out", masks=masks, val_ratio=0.4, workers=1)
    numbers = [str(number) for number in range(11)]
    assert [Dataset.open(path).pixel_classes for path in (report.path, report.val_path)] == [numbers, numbers]


def test_label_maps_are_part_of_the_identity(tmp_path):
    images, masks = pair(tmp_path)
    plain = make(images, tmp_path / "plain", workers=1)
    mapped = make(images, tmp_path / "mapped", masks=masks, workers=1)
    five = make(images, tmp_path / "five", masks=masks, classes="5", workers=1)
    assert len({Dataset.open(report.path).id for report in (plain, mapped, five)}) == 3
    assert make(images, tmp_path / "mapped", masks=masks, workers=1).reused
    write(masks, ["a/x.png"], lambda i: mask(77)[0])
    with pytest.raises(ConfigError, match="made from other images or options"):
        make(images, tmp_path / "mapped", masks=masks, workers=1)


def test_parts_join_to_the_dataset_that_one_process_makes(tmp_path):
    images, masks = pair(tmp_path)
    whole = made(tmp_path, images, masks, shard_size=1, classes="7", zero_ignored=True)
    for number in (1, 2):
        make(images, tmp_path / "parts", masks=masks, shard_size=1, classes="7", zero_ignored=True, workers=1,
             part=Part(number, 2))  # fmt: skip
    join(tmp_path / "parts")
    assert read_lock(tmp_path / "parts") == read_lock(whole)
    assert stored(tmp_path / "parts") == stored(whole)


def test_zero_ignored_reads_masks_as_ade20k_does(tmp_path):
    images, masks = pair(tmp_path)
    dataset = Dataset.open(made(tmp_path, images, masks, zero_ignored=True))
    assert dataset.pixel_classes == ["0", "1", "2"]
    for i, (_, data) in enumerate(stored(dataset.path)[key] for key in ("a/x", "a/y", "b/x")):
        expected = mask(i)[1].astype(int) - 1
        assert np.array_equal(decode_label_map(data, SIZE, 3).numpy(), np.where(expected < 0, 255, expected))


def test_suffixes_pair_names_that_differ(tmp_path):
    images, masks = pair(tmp_path, ["u/1_left.jpg", "u/2_left.jpg"], ["u/1_gt_ids.png", "u/2_gt_ids.png"])
    write(masks, ["u/1_gt_color.png", "u/1_gt_polygons.json"], lambda i: b"something else")
    assert set(stored(made(tmp_path, images, masks, mask_suffix="_left=_gt_ids"))) == {"u/1_left", "u/2_left"}
    with pytest.raises(ConfigError, match="--mask-suffix _left must be IMAGE=MASK"):
        made(tmp_path, images, masks, mask_suffix="_left")


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (5, 3, r"2 of 5 images have no mask in .*masks \(3.jpg, 4.jpg\); complete them"),
        (3, 8, r"5 of 8 masks have no image \(3.png, 4.png, 5.png, ...\); complete them"),
    ],
)
def test_what_does_not_pair_is_refused_with_counts_and_examples_unless_it_may_be_left_aside(
    tmp_path, images, masks, message
):
    folders = pair(tmp_path, [f"{i}.jpg" for i in range(images)], [f"{i}.png" for i in range(masks)])
    with pytest.raises(ConfigError, match=message) as error:
        made(tmp_path, *folders)
    assert "\n" not in str(error.value)
    report = make(folders[0], tmp_path / "out", masks=folders[1], skip_unpaired=True, workers=1)
    assert report.num_samples == 3
    assert sum(report.ignored.values()) == abs(images - masks)


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (["a/x.jpg"], ["x.png"], r"none of 1 images has a mask in .*: a/x.jpg should have a/x.png, .* e.g. x.png"),
        (["x.jpg", "x.jpeg"], ["x.png"], r"x.jpeg and x.jpg would share a mask"),
    ],
)
def test_folders_that_cannot_be_paired_are_refused(tmp_path, images, masks, message):
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, *pair(tmp_path, images, masks))


def test_a_list_of_images_takes_its_masks_by_the_same_names(tmp_path):
    images, masks = pair(tmp_path)
    (images / "train.txt").write_text("a/x.jpg\nb/x.jpg\n")
    found = stored(made(tmp_path, images / "train.txt", masks, skip_unpaired=True))
    assert {key: data for key, (_, data) in found.items()} == {"a/x": mask(0)[0], "b/x": mask(2)[0]}


def test_masks_of_tars_are_refused_with_the_way_to_have_them(tmp_path):
    write_tar(tmp_path / "in/x.tar", [("a.jpg", picture(0)), ("a.seg.png", mask(0)[0])])
    with pytest.raises(ConfigError, match="mim shards index TARS OUT --label-maps seg"):
        made(tmp_path, tmp_path / "in", tmp_path / "in")


@pytest.mark.parametrize("options", [{"classes": "3"}, {"zero_ignored": True}, {"skip_unpaired": True}])
def test_options_of_masks_without_masks_are_refused(tmp_path, options):
    images, _ = pair(tmp_path)
    with pytest.raises(ConfigError, match="go with --masks DIR"):
        make(images, tmp_path / "out", workers=1, **options)


@pytest.mark.parametrize("text", ["0", "256", "no-such-file.txt"])
def test_impossible_classes_are_refused(tmp_path, text):
    images, masks = pair(tmp_path)
    with pytest.raises(ConfigError, match=f"--classes {text}"):
        made(tmp_path, images, masks, classes=text)


def test_a_mask_of_another_size_or_class_leaves_its_image_out_by_name(tmp_path):
    images, masks = pair(tmp_path)
    write(masks, ["a/y.png"], lambda i: mask(0, size=(20, 31))[0])
    write(masks, ["b/x.png"], lambda i: mask(0, classes=9)[0])
    report = make(images, tmp_path / "out", masks=masks, classes="4", workers=1)
    reasons = {bad["file"]: bad["reason"] for bad in report.left_out}
    assert set(reasons) == {"a/y.jpg", "b/x.jpg"}
    assert "its label map is 20 x 31, but the image 20 x 30" in reasons["a/y.jpg"]
    assert "holds class 8, but there are 4 classes" in reasons["b/x.jpg"]
    with pytest.raises(DataError, match=r"more than 1 images cannot be decoded \(.*its label map"):
        make(images, tmp_path / "none", masks=masks, classes="4", workers=1, max_left_out=1)


def test_a_mask_belongs_to_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 20 x 30, shown 30 x 20
    for name, size in (("upright", (30, 20)), ("stored", (20, 30))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.open(io.BytesIO(picture(0))).save(tmp_path / f"images/{name}.jpg", exif=exif)
        write(tmp_path / "masks", [f"{name}.png"], lambda i, size=size: mask(i, size=size)[0])
    report = make(tmp_path / "images", tmp_path / "out", masks=tmp_path / "masks", workers=1)
    assert [bad["file"] for bad in report.left_out] == ["stored.jpg"]
    assert set(stored(report.path)) == {"upright"}


def test_a_shrunk_image_takes_its_mask_along(tmp_path):
    images, masks = pair(tmp_path)
    for key, (image, data) in stored(made(tmp_path, images, masks, short=10)).items():
        assert Image.open(io.BytesIO(image)).size == (15, 10)
        i = ("a/x", "a/y", "b/x").index(key)
        assert np.array_equal(decode_label_map(data, (10, 15)).numpy(), mask(i)[1][1::2, 1::2])  # centres of 2 x 2
