"""What the commands that measure share: a config with overrides, errors in one line, a table, a JSON file."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("clipdistill_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax")


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that knows --config, --stage and --json."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog="Any field can be overridden: --config.student.width=0.75",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", required=True, metavar="FILE", help="the config file")
    made.add_argument("--stage", default="", help="of the config; if none is named, the first with a teacher")
    made.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the numbers there too")
    return made


def run(work: Callable[[], str]) -> int:
    """Prints what `work` returns; an error of the user's in one line. Returns the exit status."""
    try:
        print(work())
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read_config(file: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The config of a file, with fields overridden by "--config.FIELD=VALUE".

    Raises:
      ValueError: an argument that is no override, an unknown field (with the nearest right one), a value of
        another type, a file that cannot be read.
    """
    from absl import flags
    from ml_collections import config_flags

    for word in overrides:
        if not (word.startswith("--config.") and "=" in word):
            raise ValueError(f"unexpected argument {word!r}; a field is overridden by --config.FIELD=VALUE")
    argv, values = ["", f"--config={file}", *overrides], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config: Any = values["config"].value
        return config.to_dict()  # a file that cannot be read is told here, at its first use
    except (AttributeError, KeyError) as error:
        said = str(error.args[0]).replace("\\'", "").replace("\\n", ". ").strip("'\"")
        raise ValueError(f"the config has no such field: {said}") from error
    except ImportError as error:
        raise ValueError(f"{file}: {error}; start in the folder that holds configs/") from error
    except (flags.Error, OSError, ValueError) as error:
        said = str(error)
        if "Traceback" in said:  # of get_config, which absl quotes whole
            said = f"{file}: {said.strip().splitlines()[-1].removeprefix('ValueError: ')}"
        raise ValueError(" ".join(said.split())) from error


def stage_name(config: Any, name: str) -> str:
    """`name`; where it is empty, the first stage that learns from a frozen model, or the only stage.

    Raises:
      ValueError: neither.
    """
    stages = config["stages"]
    taught = [name for name, stage in stages.items() if stage["terms"]]
    if not (name or taught or len(stages) == 1):
        raise ValueError(f"no stage has a teacher: name one by --stage ({', '.join(stages)})")
    return name or [*taught, *stages][0]


def vocab(config: Any) -> dict[str, int]:
    """What models take from the data (`systems.System`), without the data: of "train:N" the N asked for.

    Of questions, the classes of VQA's answers and of regions are those of the student's config.

    Raises:
      FileNotFoundError: there is no such tokenizer.
    """
    from clipdistill_jax.data.formats.vcr import UNITER_PERSONS
    from clipdistill_jax.models.build import build_joint
    from clipdistill_jax.systems.questions import QUESTIONS

    def size(name: str) -> int:
        if name.startswith("train:"):
            return int(name.removeprefix("train:"))
        from clipdistill_jax.data.tokenizer import load_tokenizer

        return load_tokenizer(name).vocab_size

    data = config["data"]
    if data["format"] not in QUESTIONS:
        teacher, own = size(data["tokenizer"]), data["student_tokenizer"]
        return {"teacher": teacher, "student": size(own) if own else teacher}
    words, sizes = size(data["student_tokenizer"]), build_joint(config["student"]).config
    persons = UNITER_PERSONS if (data["format"], config["student"]["kind"]) == ("vcr", "uniter") else 0
    return {
        **({"teacher": size(data["tokenizer"])} if data["tokenizer"] else {}),
        **{"student": words + persons, "mask": 0, "random_low": 1, "random_high": words},
        **{name: getattr(sizes, name) for name in ("answers", "region_classes")},
    }


def versions() -> dict[str, str]:
    """name -> version of the packages that decide a measurement, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {value}".rstrip() for name, value in rows)])


def write_json(file: Path | None, value: Any) -> None:
    """Writes a JSON file, if one is named."""
    if file is not None:
        file.expanduser().parent.mkdir(parents=True, exist_ok=True)
        file.expanduser().write_text(json.dumps(value, indent=1) + "\n")


def amount(value: float | int, unit: str) -> str:
    """12345678.0, "FLOP" -> "12.35 MFLOP"; powers of 1000."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}"
