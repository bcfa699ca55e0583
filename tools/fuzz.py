"""Coverage-guided fuzzing (atheris, libFuzzer) of the file readers and of fuse's arguments.

usage: python tools/fuzz.py TARGET [LIBFUZZER OPTION...]      e.g. -max_total_time=120

TARGET is a file's name (fuser_config.json, fuser.safetensors, projector_config.json,
projector_1.json, projector_1.pt, config.json), whose bytes are then drawn, or right, wild or op,
the random calls of python_tests/test_fuzz.py. Needs `pip install atheris` beside what the tests do.
A finding is any exception but the one clear error, a crash, 2 GiB of memory or 20 seconds.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]
with atheris.instrument_imports(include=["c2c_ext", "json", "zipfile", "pickletools"]):
    import hostile
    import test_fuzz

    from c2c_ext.fuser import parameter_shapes
    from c2c_ext.info import read_model

TESTS = {
    "right": test_fuzz.test_right_arguments_give_the_reference,
    "wild": test_fuzz.test_wild_arguments_give_the_reference_or_an_error,
    "op": test_fuzz.test_wild_arguments_of_the_op_change_no_input,
}


def reader(name: str, place: Path) -> tuple[Callable[[bytes], None], bytes]:
    """What reads a file of drawn bytes, and a good file to start from."""
    if name == "config.json":
        path = place / name
        good = (hostile.E2E / "receiver" / name).read_bytes()

        def read_config(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read_model(place)
            except (ValueError, TypeError, OSError) as error:
                assert str(error).isprintable() and len(str(error)) < 600, error

        return read_config, good
    (kind,) = [kind for kind, file in hostile.FILES if file == name]
    directory = hostile.good_directories(place)[kind]
    good = (directory / name).read_bytes()
    expected = hostile.shapes(hostile.LOADERS[kind](directory))

    def read(data: bytes) -> None:
        (directory / name).write_bytes(data)
        result = hostile.load(directory, kind)
        if isinstance(result, str):
            return
        assert hostile.shapes(result) == dict(parameter_shapes(result.config))
        # Other numbers ask for other weights in vain; but a mapping may name fewer projectors.
        assert name == "projector_config.json" or hostile.shapes(result) == expected

    return read, good


def main() -> None:
    target, options = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        if target in TESTS:
            one, corpus = TESTS[target].hypothesis.fuzz_one_input, []
        else:
            one, good = reader(target, Path(place))
            corpus = [Path(place) / "corpus"]
            corpus[0].mkdir()
            (corpus[0] / "good").write_bytes(good)
        limits = ["-rss_limit_mb=2048", "-timeout=20", "-max_len=100000"]
        atheris.Setup([sys.argv[0], *limits, *options, *map(str, corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
