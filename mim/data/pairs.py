"""Images and their masks, which lie in another folder under the same relative path: `a/x.jpg` beside `a/x.png`.

Names that differ by a suffix (Cityscapes) are paired by stating both: `_leftImg8bit=_gtFine_labelTrainIds`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mim.config import ConfigError
from mim.data.listing import Listing, list_images
from mim.data.sources import Files, Source

SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Masks:
    """How label maps come to a dataset. Part of what decides its bytes."""

    suffixes: str | None = None  # IMAGE=MASK: what the stems end with
    zero_ignored: bool = False  # 0 is no class, and all others move down by one (ADE20K)
    classes: tuple[str, ...] | None = None  # names; None: as many numbers as occur
    skip_unpaired: bool = False


def with_masks(source: Source, folder: Path, masks: Masks) -> Source:
    """The same images with the mask of each. Raises ConfigError where images and masks do not pair one to one."""
    if not isinstance(source.reader, Files):
        raise ConfigError(
            "--masks goes with a folder or a list of images; of tars that hold label maps: mim shards index TARS OUT "
            "--label-maps seg.png"
        )
    theirs, ours = _suffixes(masks.suffixes)
    listing = list_images(folder)
    pngs = [file for file in listing.images if file.path.lower().endswith(".png")]
    files = {file.path: file for file in pngs if _stem(file.path).endswith(ours)}
    by_stem = {_stem(path).removesuffix(ours): path for path in files}
    images = [_stem(name).removesuffix(theirs) if _stem(name).endswith(theirs) else None for name in source.names]
    _refuse_shared(source, images)
    found = [by_stem.get(stem) if stem is not None else None for stem in images]
    kept = [i for i, path in enumerate(found) if path is not None]
    if not kept:
        raise ConfigError(_nothing_paired(source, listing, ours))
    alone = [name for name, path in zip(source.names, found, strict=True) if path is None]
    extra = sorted(files.keys() - set(found))
    if (alone or extra) and not masks.skip_unpaired:
        facts = [_unpaired(alone, f"of {len(source.names)} images have no mask in {folder}")] if alone else []
        facts += [_unpaired(extra, f"of {len(files)} masks have no image")] if extra else []
        raise ConfigError(f"{', and '.join(facts)}; complete them, or leave such files aside: --skip-unpaired")
    paired = [path for path in found if path is not None]
    marks = [
        f"{source.marks[i]}\0{files[path].size}\0{files[path].mtime_ns}" for i, path in zip(kept, paired, strict=True)
    ]
    unpaired = {"images without a mask": len(alone), "masks without an image": len(extra)}
    return replace(
        source,
        names=[source.names[i] for i in kept],
        keys=[source.keys[i] for i in kept],
        places=[source.places[i] for i in kept],
        marks=marks,
        labels=[source.labels[i] for i in kept] if source.labels is not None else None,
        ignored=source.ignored | {what: count for what, count in unpaired.items() if count},
        masks=Files(folder),
        mask_places=paired,
    )


def read_classes(text: str | None) -> tuple[str, ...] | None:
    """`--classes`: a number of classes, or a file of one name per line, the line number from 0 being the class."""
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        names = [str(number) for number in range(int(text))]
    else:
        try:
            names = [line.strip() for line in Path(text).read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--classes {text} is neither a number nor a readable file of names ({error})") from error
        names = names[:-1] if names and not names[-1] else names
    if not 1 <= len(names) <= 255 or not all(names):
        raise ConfigError(f"--classes {text} gives {len(names)} classes; 1 to 255 are possible, each with a name")
    return tuple(names)


def _suffixes(text: str | None) -> tuple[str, str]:
    if text is None:
        return "", ""
    theirs, equals, ours = text.partition("=")
    if not equals:
        raise ConfigError(
            f"--mask-suffix {text} must be IMAGE=MASK, what their names end with before the dot, e.g. "
            f"_leftImg8bit=_gtFine_labelTrainIds"
        )
    return theirs, ours


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.rpartition(".")[0]


def _refuse_shared(source: Source, stems: list[str | None]) -> None:
    """Two images of one stem would share a mask; then one of them usually is the mask."""
    first: dict[str, str] = {}
    for name, stem in zip(source.names, stems, strict=True):
        if stem is not None and first.setdefault(stem, name) != name:
            raise ConfigError(
                f"{first[stem]} and {name} would share a mask; keep images and masks in folders of their own"
            )


def _unpaired(names: list[str], fact: str) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} {fact} ({', '.join(names[:SHOWN])}{more})"


def _nothing_paired(source: Source, listing: Listing, ours: str) -> str:
    return (
        f"none of {len(source.names)} images has a mask in {listing.folder}: {source.names[0]} should have "
        f"{_stem(source.names[0])}{ours}.png, and there lies e.g. {listing.images[0].path}; where names differ by a "
        f"suffix, state it as --mask-suffix IMAGE=MASK"
    )
