"""Speed of the data path against what it replaces, in interleaved rounds: decode, crop, BEiT's views, reading, loader.

One process pinned to one core, timed by its CPU time, except for `loader`, whose workers are timed by the clock.
In each round every variant of a stage runs once over the same images; a ratio is the median over rounds of the ratio to
the first variant of that round.

python benchmarks/data.py FOLDER_OF_JPEGS --out data.json
python benchmarks/data.py FOLDER_OF_JPEGS --stages decode reading --rounds 9
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import PIL
import torch
import torchvision
import webdataset
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tv

from mim.data import augment, jpeg, stream
from mim.data.decode import decode, open_image
from mim.data.make import make
from mim.data.order import Order, rng
from mim.data.shards import Dataset
from mim.data.store import Store
from mim.masking import block

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZE, TOKENS, BATCH, WORKERS, SHORT = (224, 224), (112, 112), 64, 2, 256
CROP = functools.partial(augment.crop, scale=(0.2, 1.0))  # MAE
BEIT_SCALE = (0.08, 1.0)
CPU = torch.device("cpu")


# ---- what is compared with -----------------------------------------------------------------------


MAE = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)  # facebookresearch/mae, main_pretrain.py


def rgb(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def mae_path(data):
    return MAE(rgb(data))


class UnilmBeit:
    """unilm/beit, DataAugmentationForBEiT: jitter and flip of the whole image, then one box at two sizes."""

    def __init__(self, strength):
        change = [transforms.ColorJitter(strength, strength, strength)] if strength else []
        self.common = transforms.Compose([*change, transforms.RandomHorizontalFlip(0.5)])
        self.normalize = transforms.Normalize(MEAN, STD)

    def __call__(self, data):
        image = self.common(rgb(data))
        box = transforms.RandomResizedCrop.get_params(image, BEIT_SCALE, (3 / 4, 4 / 3))
        large = tv.resized_crop(image, *box, SIZE, tv.InterpolationMode.BICUBIC)
        small = tv.resized_crop(image, *box, TOKENS, tv.InterpolationMode.LANCZOS)
        mask = block((14, 14), np.random.default_rng(), ratio=0.4)
        return self.normalize(tv.to_tensor(large)), 0.8 * tv.to_tensor(small) + 0.1, mask


def over(function, images):
    """Run a function on every image; returns the number of views."""
    for data in images:
        function(data)
    return len(images)


# ---- ours ----------------------------------------------------------------------------------------


class Rows:
    """Writes views into a batch as the loader does."""

    def __init__(self, view, sizes, *, repeats=1, whole=False, finish=None):
        self.view, self.sizes, self.repeats, self.whole, self.finish = view, sizes, repeats, whole, finish
        self.batches = [torch.empty((BATCH, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2) for size in sizes]

    def __call__(self, images):
        row = 0
        for number, data in enumerate(images):
            image = decode(data) if self.whole or self.repeats > 1 else open_image(data)
            for draw in range(self.repeats):
                views = self.view(image, rng("view", 0, 0, number, draw), self.sizes)
                for batch, view in zip(self.batches, views, strict=True):
                    batch[row % BATCH] = view
                row += 1
                if self.finish is not None and row % BATCH == 0:
                    self.finish(*self.batches)
        return row


def normalized(batch):
    """What the device does, on this core."""
    images = stream.to_device({"images": batch, "range": [[0, 255]] * 3}, CPU)["images"]
    return images.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def jittered(large, small):
    """What the device does with jitter, on this core."""
    noise = torch.arange(BATCH, dtype=torch.int64)
    batch = {"images": large, "tokenizer_images": small, "noise": noise, "range": [[0, 255]] * 3, "jitter": 0.4}
    return stream.to_device(batch, CPU)


def beit_view(image, generator, sizes):
    block((14, 14), generator, ratio=0.4)
    return augment.crop(image, generator, sizes, scale=BEIT_SCALE)


def without_simplejpeg(function):
    def run(*arguments):
        with mock.patch.object(jpeg, "simplejpeg", None):
            return function(*arguments)

    return run


# ---- stages: name -> variants, of which the first is compared with ---------------------------------


def decode_stage(images):
    return {
        "PIL + torchvision v1 -> f32 (MAE)": lambda: over(mae_path, images),
        "ours -> u8": lambda: Rows(CROP, [SIZE])(images),
        "ours -> u8, decoded whole": lambda: Rows(CROP, [SIZE], whole=True)(images),
        "ours -> u8, without simplejpeg": without_simplejpeg(lambda: Rows(CROP, [SIZE])(images)),
        "ours -> f32 on this core": lambda: Rows(CROP, [SIZE], finish=normalized)(images),
    }


def short_stage(images):
    small = [shortened(data) for data in images]
    print(f"short side {SHORT}: {sum(map(len, small)) / len(small) / 1024:.1f} KiB per image")
    return {
        "PIL + torchvision v1 on the originals": lambda: over(mae_path, images),
        f"PIL + torchvision v1 on short {SHORT}": lambda: over(mae_path, small),
        f"ours on short {SHORT}": lambda: Rows(CROP, [SIZE])(small),
    }


def repeats_stage(images):
    return {
        "PIL + torchvision v1, a decode per crop": lambda: over(mae_path, images),
        "ours, 4 crops per decode": lambda: Rows(CROP, [SIZE], repeats=4)(images),
        "ours, 2 crops per decode": lambda: Rows(CROP, [SIZE], repeats=2)(images),
        "ours, 2 crops, each its own box": lambda: Rows(CROP, [SIZE])([d for d in images for _ in range(2)]),
    }


def beit_stage(images):
    sizes = [SIZE, TOKENS]
    return {
        "unilm's order in PIL": lambda: over(UnilmBeit(0.4), images),
        "unilm's order in PIL without jitter": lambda: over(UnilmBeit(0.0), images),
        "ours, jitter on the device": lambda: Rows(beit_view, sizes)(images),
        "ours, jitter on this core": lambda: Rows(beit_view, sizes, finish=jittered)(images),
    }


def reading_stage(dataset):
    tars = [str(file) for file in sorted(dataset.path.glob("*.tar"))]
    rows = [(shard, row) for shard, count in enumerate(dataset.counts) for row in range(count)]
    places = []
    for number, tar in enumerate(tars):
        index = np.load(Path(tar).with_suffix(".npy"), allow_pickle=False)["image"]
        places += [(tars[number], int(offset), int(size)) for offset, size, _ in index.tolist()]
    store, passes = Store(), 8

    def iterate():
        for _ in range(passes):
            count = sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False))
            assert count == len(rows)
        return passes * len(rows)

    return {
        "webdataset's tar iteration": iterate,
        "ours without CRC32": lambda: passes * over(lambda place: store.pread(*place), places * passes) // passes,
        "ours": lambda: over(lambda place: dataset.read(*place), rows * passes),
    }


def loader_stage(dataset):
    num_steps = 16
    tars = [str(file) for file in sorted(dataset.path.glob("*.tar"))]
    order = Order(dataset.id, dataset.counts, seed=0)

    def timed(batches):
        """Images per second from the second batch on, when the workers have started."""
        iterator = iter(batches)
        next(iterator)
        start = time.perf_counter()
        count = sum(len(batch) for batch in itertools.islice(iterator, num_steps))
        return count / (time.perf_counter() - start)

    def peer():
        source = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).repeat().shuffle(100)
        source = source.map(lambda sample: mae_path(sample["jpg"])).batched(BATCH)
        return timed(torch.utils.data.DataLoader(source, batch_size=None, num_workers=WORKERS))

    def ours(whole=False):
        found = stream.loader(
            dataset, order=order, view=CROP, sizes=[SIZE], batch_size=BATCH, num_steps=num_steps + 4, workers=WORKERS
        )
        patch = mock.patch.object(stream, "open_image", decode) if whole else contextlib.nullcontext()
        with patch:
            return timed(batch["images"] for batch in found)

    return {
        "webdataset + PIL + torchvision v1": peer,
        "ours": ours,
        "ours, decoded whole": functools.partial(ours, whole=True),
    }


# ---- measuring -----------------------------------------------------------------------------------


def shortened(data):
    image = rgb(data)
    share = SHORT / min(image.size)
    if share < 1:
        image = image.resize([round(side * share) for side in image.size], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixel_error(images):
    """Greatest 99th percentile over images of the difference to Pillow's decode, crop and resize, in levels."""
    worst = []
    for number, data in enumerate(images):
        image = open_image(data)
        box = augment._random_box(*image.shape[1:], rng("view", 0, 0, number), (0.2, 1.0), (3 / 4, 4 / 3))
        (found,) = augment._render(image, box, [SIZE])
        expected = tv.resized_crop(rgb(data), *box, SIZE, tv.InterpolationMode.BICUBIC)
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
        worst.append(np.percentile(difference, 99))
    return max(worst)


def measure(variants, rounds, *, rates):
    """Run the variants in turn; `rates`: they return images per second, otherwise how many images they did."""
    found = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.process_time()
            result = run()
            found[name].append(result if rates else result / (time.process_time() - start))
    first = next(iter(found.values()))
    return {
        name: {
            "images_per_s": round(statistics.median(values), 1),
            "min": round(min(values), 1),
            "max": round(max(values), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(values, first, strict=True)), 2),
        }
        for name, values in found.items()
    }


def show(stage, table):
    print(f"\n{stage:44} {'images/s':>9} {'(min - max)':>19} {'ratio':>6}")
    for name, row in table.items():
        print(f"{name:44} {row['images_per_s']:9.0f} ({row['min']:8.0f} - {row['max']:6.0f}) {row['ratio']:6.2f}")


def main():
    stages = {"decode": decode_stage, "short": short_stage, "repeats": repeats_stage, "beit": beit_stage}
    on_shards = {"reading": reading_stage, "loader": loader_stage}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="JPEG files, at any depth")
    parser.add_argument("--stages", nargs="+", choices=[*stages, *on_shards], default=[*stages, *on_shards])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="images used (default: all)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {arguments.core})
    files = [file for file in sorted(arguments.folder.rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg")]
    images = [file.read_bytes() for file in files[: arguments.limit]]
    print(f"{len(images)} images, {sum(map(len, images)) / len(images) / 1024:.1f} KiB each, simplejpeg", end=" ")
    print("absent" if jpeg.simplejpeg is None else jpeg.simplejpeg.__version__)
    results = {}
    if "decode" in arguments.stages:
        results["p99_error_levels"] = float(pixel_error(images))
        print(f"99th percentile of the error against Pillow: {results['p99_error_levels']:g} levels in the worst image")
    with tempfile.TemporaryDirectory() as folder:
        if set(on_shards) & set(arguments.stages):
            (Path(folder) / "in").mkdir()
            for number, data in enumerate(images):
                (Path(folder) / f"in/{number}.jpg").write_bytes(data)
            make(Path(folder) / "in", Path(folder) / "shards", shard_size=125, workers=1)
            dataset = Dataset.open(Path(folder) / "shards")
        for stage in arguments.stages:
            os.sched_setaffinity(0, cores if stage == "loader" else {arguments.core})
            variants = stages[stage](images) if stage in stages else on_shards[stage](dataset)
            results[stage] = measure(variants, arguments.rounds, rates=stage == "loader")
            show(stage, results[stage])
    if arguments.out:
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, PIL, webdataset, np)}
        facts = {"date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine(), **versions}
        arguments.out.write_text(json.dumps({**facts, "rounds": arguments.rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
