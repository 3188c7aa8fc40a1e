"""The command `bit-tf`: one module a sub-command, each with `register`."""

from bit_tf.commands import classify, embed, models, program

__all__ = ["main"]


def main() -> None:
    """Runs `bit-tf`."""
    program.run(
        "bit-tf",
        "Use BiT models: list, embed, classify.",
        (models, embed, classify),
    )
