"""lm-evaluation-harness's own command with the model type ``c2c`` in it.

`python -m c2c_ext.evaluation.lm_eval run --model c2c --model_args mode=c2c --tasks TASK ...`

The harness looks for no models in other packages, so that its command does not know one that nobody
has imported.
"""

from __future__ import annotations


def main() -> None:
    """Registers the model type and runs the command `lm_eval` on this process's arguments."""
    from lm_eval.__main__ import cli_evaluate

    from . import harness  # noqa: F401 - importing it registers c2c

    cli_evaluate()


if __name__ == "__main__":
    main()
