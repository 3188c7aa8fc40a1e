"""The command `bit-tf`: one module a sub-command, each with `register`."""

from bit_tf.commands import (
    classify,
    embed,
    evaluate,
    finetune,
    index,
    inspect,
    models,
    program,
    search,
)

__all__ = ["main"]


def main() -> None:
    """Runs `bit-tf`."""
    program.run(
        "bit-tf",
        "Use BiT models: list, inspect, embed, classify, search, fine-tune, "
        "evaluate.",
        (models, inspect, embed, classify, search, index, finetune, evaluate),
    )
