"""Where the region features of an image are found, whatever file format holds them."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.snli_ve import SnliVeRecord
from clipdistill_jax.data.formats.vcr import VcrRecord
from clipdistill_jax.data.formats.vqa import VqaRecord
from clipdistill_jax.data.regions import MissingRegions, Regions, join, most_confident, prepend_image
from clipdistill_jax.data.regions.bottom_up import BottomUpTsv
from clipdistill_jax.data.regions.uniter import NpzFolder, UniterLmdb, coco_name, flickr_name, vcr_names
from clipdistill_jax.data.regions.vl_bert import VlBertFolder
from clipdistill_jax.data.workers import in_threads

Record = VcrRecord | SnliVeRecord | VqaRecord
THRESHOLD, MIN_COUNT = 0.2, 10  # UNITER's, of detections
# format -> (how a file or folder is opened, how a folder that may be one is recognised)
_OPEN: dict[str, Callable[..., Mapping[str, Regions]]] = {
    "npz": NpzFolder,
    "lmdb": UniterLmdb,
    "tsv": BottomUpTsv,
    "vl_bert": VlBertFolder,
}
REGION_FORMATS = tuple(_OPEN)
_FILES = {"npz": "*.npz", "lmdb": "data.mdb", "tsv": "*.tsv", "vl_bert": "*.json"}


class RegionSource:
    """All files of region features below a folder as one; keys are those of the format's reader.

    To be closed, `with` does it: a process can open an LMDB once at a time.

    Attributes:
      fingerprint: hash of the names and sizes of the files, and of a sample of what they hold.
    """

    def __init__(self, path: str | os.PathLike[str], format: str, *, width: int | None):
        """Opens them.

        Args:
          path: a file, or a folder that holds such files itself or in folders.
          format: one of REGION_FORMATS.
          width: the features' width that the model takes; None takes any.

        Raises:
          FileNotFoundError: there is no such file or folder, or no file of the format in it.
          FormatError: a file is damaged. Looking up what two of them hold raises it too.
          ValueError: there is no such format.
        """
        if format not in _OPEN:
            raise ValueError(f"region_format={format!r} must be one of {', '.join(_OPEN)}")
        self.path, self.format = Path(path), format
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of region features")
        found = [self.path] if self.path.is_file() else sorted(self.path.rglob(_FILES[format]))
        if not found:
            raise FileNotFoundError(
                f"{path} has no region features of the format {format!r} ({_FILES[format]})"
            )
        units = found if format == "tsv" else sorted({file.parent for file in found})
        self._parts = {unit: _OPEN[format](unit, width=width) for unit in units}
        digest = hashlib.sha256(format.encode())
        # More threads than cores, for many small files on a remote disk.
        for file, sample in zip(found, in_threads(_sample, found, workers=16), strict=True):
            name = file.relative_to(self.path) if file != self.path else file.name
            digest.update(f"{name} {sample}\n".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __enter__(self) -> "RegionSource":
        return self

    def __exit__(self, *exception: object) -> None:
        for part in self._parts.values():
            if isinstance(part, UniterLmdb):
                part.close()

    def __contains__(self, name: object) -> bool:
        return self._unit(name) is not None

    def __getitem__(self, name: str) -> Regions:
        unit = self._unit(name)
        if unit is None:
            raise MissingRegions(f"{self.path} has no {name}")
        return self._parts[unit][name]

    def _unit(self, name: object) -> Path | None:
        """The folder or file that holds a name. Raises FormatError where two do."""
        units = [unit for unit, part in self._parts.items() if name in part]
        if len(units) > 1:
            raise FormatError(f"{name} is in {units[0]} and in {units[1]}: give the one that is meant")
        return units[0] if units else None

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of these names that is there."""
        return next((name for name in names if name in self), None)


def _sample(file: Path) -> str:
    """The size, and a hash of a kilobyte in the middle and at the end, where npz have their checksums."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for place in (size // 2, max(size - 1024, 0)):
            content.seek(place)
            digest.update(content.read(1024))
    return f"{size} {digest.hexdigest()}"


def region_names(record: Record, split: str, format: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names under which a record's image can be: of its annotated regions (VCR alone), and of detected ones.

    UNITER's own names come first, then the image file's, then the dataset's number of it.
    """
    suffix = ".npz" if format in ("npz", "lmdb") else ""
    annotated: tuple[str, ...] = ()
    if isinstance(record, VcrRecord):
        truth, found = vcr_names(split, record.image)
        annotated, names = (truth,), [found]
    elif isinstance(record, SnliVeRecord):
        names = [flickr_name(record.image_id)] if record.image_id.isdecimal() else []
        names.append(record.image_id)
    else:
        subset = record.image.stem.split("_")[1]
        names = [coco_name(subset, record.image_id), record.image.stem, str(record.image_id)]
    if record.image.stem not in names and not annotated:
        names.append(record.image.stem)

    def finish(plain: Sequence[str]) -> tuple[str, ...]:
        return tuple(name.removesuffix(".npz") + suffix for name in plain)

    return finish(annotated), finish(names)


def read_regions(
    source: RegionSource,
    annotated: Sequence[str],
    detected: Sequence[str],
    *,
    num_objects: int,
    max_regions: int,
    need_detected: bool,
    where: str,
) -> Regions:
    """The regions of an image as they are stored: the whole image, annotated ones, then detected ones.

    Args:
      source: where they are.
      annotated, detected: as `region_names` gives them.
      num_objects: annotated regions that there must be; 0 where the dataset has none.
      max_regions: most regions beside the whole image; the least confident detections are left out.
      need_detected: detections must be there.
      where: names the image in errors.

    Raises:
      MissingRegions: a needed record is absent.
      FormatError: it is damaged, has another width or number of regions, or too many objects.
    """
    parts = []
    if num_objects:
        name = source.first_of(annotated)
        if name is None:
            raise MissingRegions(f"{where}: {source.path} has no {' or '.join(annotated)}")
        if num_objects > max_regions:
            raise FormatError(
                f"{where}: {num_objects} objects, more than max_regions={max_regions}: raise it"
            )
        parts.append(source[name])
    name = source.first_of(detected)
    if name is None and (need_detected or not parts):
        raise MissingRegions(f"{where}: {source.path} has no {' or '.join(detected)}")
    if name is not None:
        found, room = source[name], max_regions - num_objects
        parts.append(
            found.take(slice(room))
            if found.conf is None
            else most_confident(found, threshold=THRESHOLD, min_count=MIN_COUNT, max_count=room)
        )
    regions = parts[0]
    if len(parts) == 2:
        regions = join(parts[0], parts[1], where, num_objects=num_objects)
    elif num_objects and len(regions) != num_objects:
        raise FormatError(f"{where}: {len(regions)} ground-truth regions, but {num_objects} objects")
    return prepend_image(regions)
