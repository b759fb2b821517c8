"""The world as an LSMDC tree."""

from __future__ import annotations

from pathlib import Path

from clipdistill_jax.data.shapes.tree import World, sentences, write_tree
from clipdistill_jax.data.shapes.world import WorldConfig

_FILES = {
    "train": "LSMDC16_annos_training.csv",
    "validation": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
_CLIPS_A_MOVIE = 100


def write_lsmdc(folder: str | Path, config: WorldConfig, workers: int | None = None) -> Path:
    """Writes the world as an LSMDC tree, see `write_tree`.

    Clips follow each other in movies of a hundred, each in a folder of its own. A training clip has
    `config.captions` lines, the others one.
    """

    def clip_id(name: str) -> str:
        movie, place = divmod(int(name.removeprefix("video")), _CLIPS_A_MOVIE)
        start = place * config.seconds
        return f"{1001 + movie}_Moving_Shapes_{_clock(start)}-{_clock(start + config.seconds)}"

    return write_tree(
        folder,
        config,
        _annotate,
        format="lsmdc",
        clip_id=clip_id,
        video_file=lambda video_id: f"{video_id.rpartition('_')[0]}/{video_id}.mp4",
        workers=workers,
    )


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}.{seconds // 60 % 60:02d}.{seconds % 60:02d}.000"


def _annotate(folder: Path, world: World, config: WorldConfig) -> None:
    said = sentences(world, train=config.captions, evaluation=1)
    for split, name in _FILES.items():
        lines = []
        for scene in world[split]:
            start, _, end = scene.video_id.rpartition("_")[2].partition("-")
            lines += [
                "\t".join((scene.video_id, start, end, start, end, sentence)) + "\n"
                for sentence in said[scene.video_id]
            ]
        (folder / name).write_text("".join(lines))
