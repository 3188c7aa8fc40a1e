"""`bit-tf finetune`: labelled pictures → a classifier of one's own."""

import argparse
import collections
import math
import os
import re
import shlex
import sys

from bit_tf import errors, hyperrule
from bit_tf.commands import program

__all__ = ["register"]

# What a run writes into its directory.
_MADE = (
    "state",
    "logs",
    "history.jsonl",
    "model.keras",
    "metrics.json",
    "learning_curves.png",
    "confusion_matrix.png",
    "reliability.png",
    "mistakes.png",
)
_STATE = ("state.npz", "lock")
# By one of these a run's directory is known.
_RESULTS = ("model.keras", "metrics.json", "history.jsonl")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="labelled pictures to a classifier of one's own",
        description="Fine-tunes a BiT model, or another publisher's feature "
        "vectors, by BiT-HyperRule, and scores the result. Run again after an "
        "interruption, it goes on from its last state. Trains on all GPUs of "
        "the machine, and on several machines with TF_CONFIG.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FILE|HANDLE",
        help="published weights such as BiT-M-R50x1, a checkpoint of any "
        "format, a fine-tuned .keras file, or feature vectors by TF-Hub "
        "handle, SavedModel directory or .tar.gz archive",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="SPEC",
        help="folder:DIR, csv:FILE, or a name of TensorFlow Datasets, such as "
        "cifar10 or oxford_flowers102:2.*",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="where the result, the logs and the state are written",
    )
    data = parser.add_argument_group("data")
    program.add_dataset_options(data)
    data.add_argument(
        "--examples-per-class",
        type=program.positive,
        metavar="K",
        help="train on K examples of each class, drawn by --seed",
    )
    data.add_argument(
        "--validation",
        type=_fraction,
        metavar="FRACTION",
        help="of the training examples that is held out, if there is no "
        "validation split; scored while training",
    )
    rule = parser.add_argument_group(
        "BiT-HyperRule",
        "What is not given follows from the number of training examples and "
        "the size of their pictures.",
    )
    rule.add_argument(
        "--rule-source",
        choices=["code", "paper"],
        default="code",
        help="large pictures are of 512 and 480 pixels in the authors' code, "
        "448 and 384 in the paper (%(default)s)",
    )
    rule.add_argument(
        "--batch-size",
        type=program.positive,
        default=512,
        metavar="B",
        help="examples a step, over all devices; another one than 512 scales "
        "steps and learning rate (%(default)s)",
    )
    rule.add_argument(
        "--steps",
        type=program.positive,
        metavar="N",
        help="of training; the schedule is scaled to them",
    )
    rule.add_argument(
        "--base-learning-rate",
        type=_positive_number,
        default=0.003,
        metavar="RATE",
        help="at a batch of 512 (%(default)s)",
    )
    rule.add_argument(
        "--resize",
        type=program.positive,
        metavar="PIXELS",
        help="side of training pictures before the crop",
    )
    rule.add_argument(
        "--crop",
        type=program.positive,
        dest="crop_size",
        metavar="PIXELS",
        help="side of the crop, and of pictures that are scored",
    )
    rule.add_argument(
        "--mixup", type=_alpha, metavar="ALPHA", help="of Beta(α, α); 0 is none"
    )
    rule.add_argument(
        "--no-flip",
        dest="flip",
        action="store_false",
        help="where left and right are what is to be learnt",
    )
    rule.add_argument(
        "--no-crop",
        dest="crop",
        action="store_false",
        help="where place or number are what is to be learnt",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--seed", type=_seed, default=0, help="of all that is random (0)"
    )
    training.add_argument(
        "--micro-batches",
        type=program.positive,
        metavar="N",
        help="parts of each device's batch, computed one after the other to "
        "save memory; the result is the same (default: so many that "
        f"{hyperrule.AT_ONCE} pictures of 480 × 480 pixels, or as many "
        "pixels, are computed at once)",
    )
    training.add_argument(
        "--recompute",
        action="store_true",
        help="keep less for the gradient, and compute it again: about a "
        "quarter more time for less memory; the result is the same",
    )
    training.add_argument(
        "--freeze",
        type=_expression,
        metavar="REGEX",
        help="variables that are not trained, such as 'root_block|block[1-3]'",
    )
    training.add_argument(
        "--precision",
        choices=["float32", "mixed_bfloat16"],
        default="float32",
        help="of computation; weights are float32 (%(default)s)",
    )
    training.add_argument(
        "--from-scratch",
        action="store_true",
        help="begin with random weights; --model may then be an architecture, "
        "such as R50x1",
    )
    training.add_argument(
        "--evaluate-every",
        type=program.positive,
        metavar="N",
        help="steps between scores on the validation split (a tenth of all)",
    )
    training.add_argument(
        "--checkpoint-every",
        type=program.positive,
        metavar="N",
        help="steps between states (a twentieth of all, at most 100)",
    )
    training.add_argument(
        "--deterministic",
        action="store_true",
        help="an interrupted run ends with the very bits of one that was not; "
        "slower",
    )
    training.add_argument(
        "--tpu",
        metavar="NAME",
        help="a Cloud TPU by name or address, or 'local'",
    )
    training.add_argument(
        "--restart",
        action="store_true",
        help="discard what an earlier run left in --output",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check data and model, print the rule, and stop",
    )
    program.add_relocate(parser)
    parser.set_defaults(run=run)


def run(args) -> int:
    errors.import_extra("matplotlib.figure", "plot")
    _require_output(args.output, args.restart)
    program.quiet_tensorflow()
    from bit_tf import distribution

    # Before anything else touches TensorFlow.
    if args.dry_run:
        # Workers would wait for each other.
        strategy = distribution.default()
    else:
        strategy = distribution.strategy(tpu=args.tpu)
    where = distribution.place(strategy)
    from bit_tf import transfer_run

    prepared = transfer_run.prepare(_settings(args))
    micro_batches = args.micro_batches or hyperrule.micro_batches(
        prepared.rule, where.replicas
    )
    # A run itself looks soon enough, and loads the model once.
    frozen = transfer_run.frozen(prepared) if args.dry_run else None
    if where.is_chief:
        _print(_table(args, prepared, where, micro_batches, frozen))
    if args.dry_run:
        return 0
    result = transfer_run.run(
        prepared,
        args.output,
        strategy=strategy,
        micro_batches=micro_batches,
        recompute=args.recompute,
        restart=args.restart,
    )
    if where.is_chief:
        _print(_outcome(args.output, prepared, result))
    return 0


def _settings(args):
    """The arguments as transfer_run takes them."""
    from bit_tf import transfer_run

    return transfer_run.Settings(
        model=args.model,
        dataset=args.dataset,
        data_dir=args.data_dir,
        manual_dir=args.manual_dir,
        bad_images=args.bad_images or "raise",
        examples_per_class=args.examples_per_class,
        validation=args.validation,
        rule_source=args.rule_source,
        batch_size=args.batch_size,
        steps=args.steps,
        base_learning_rate=args.base_learning_rate,
        resize=args.resize,
        crop_size=args.crop_size,
        mixup_alpha=args.mixup,
        flip=args.flip,
        crop=args.crop,
        seed=args.seed,
        freeze=args.freeze,
        precision=args.precision,
        from_scratch=args.from_scratch,
        evaluate_every=args.evaluate_every,
        checkpoint_every=args.checkpoint_every,
        deterministic=args.deterministic,
        download=not args.dry_run,
    )


def _table(
    args, prepared, where, micro_batches: int, frozen: tuple[int, int] | None
) -> list[tuple[str, str]]:
    """What will be done, and what it costs."""
    rule, sizes = prepared.rule, prepared.sizes
    pictures = rule.steps * rule.batch_size
    height, width = prepared.image_size or (0, 0)
    at_once = math.ceil(rule.batch_size / where.replicas / micro_batches)
    source = prepared.look
    size = f"{height} × {width} pixels" if height else "of unknown size"
    if not args.crop:
        cut = f"squashed to {rule.resolution.crop}"
    else:
        cut = (
            f"resized to {rule.resolution.resize}, cropped to "
            f"{rule.resolution.crop} at random"
        )
    cut += ", mirrored at random" if args.flip else ", not mirrored"
    partly = ""
    if args.precision != "float32" and source.kind in ("hub", "transfer"):
        partly = ", of the head alone: a SavedModel computes as it was saved"
    devices = _count(where.replicas, "device")
    if where.workers > 1:
        devices += f" of {where.workers} workers"
    rows = [
        (
            "model",
            f"{source.source}"
            f"{f', {source.architecture}' if source.architecture else ''}"
            f"{', random weights' if args.from_scratch else ''}"
            f"{'' if source.here else ', downloaded if need be'}",
        ),
        (
            "data",
            f"{prepared.dataset.name}: {len(prepared.class_names)} classes, "
            f"{size}",
        ),
        *((f"  {name}", _count(n, "example")) for name, n in sizes.items()),
        ("pictures", cut),
        ("mixup", f"α {rule.mixup_alpha:g}" if rule.mixup_alpha else "none"),
        ("batch", f"{_count(rule.batch_size, 'example')}, on {devices}"),
        ("  at once", f"{at_once} a device (--micro-batches {micro_batches})"),
        ("learning rate", _schedule(rule)),
        ("precision", args.precision + partly),
        ("steps", str(rule.steps)),
        (
            "cost",
            f"{rule.steps} × {rule.batch_size} = {pictures:,} pictures, "
            f"{pictures / rule.examples:.1f} times each",
        ),
    ]
    if args.freeze is not None:
        text = repr(args.freeze)
        if frozen is not None:
            text += f", {frozen[0]} of {_count(frozen[1], 'variable')}"
        rows.append(("frozen", text))
    return rows


def _schedule(rule) -> str:
    """How the learning rate goes, in as far as steps feel it."""
    warm_up, *decays, end = rule.supports
    text = f"{rule.peak_learning_rate:.4g}"
    if warm_up:
        text += f" after {_count(warm_up, 'step')} of warm-up"
    # The step of a decay's own number has the rate before it.
    felt = collections.Counter(at for at in decays if at < end - 1)
    before = None
    for at, times in felt.items():
        text += ", " if before == times else f", ÷ {10**times} after "
        text += str(at)
        before = times
    if felt.total() < len(decays):
        text += f" ({_count(end, 'step')}: too few for all decays)"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _outcome(output: str, prepared, result) -> list[tuple[str, str]]:
    """What came out, and how to go on."""
    metrics = result.metrics
    rows = []
    if metrics["scored_on"]:
        rows.append(
            (
                "accuracy",
                f"{metrics['top1']:.2%} of {metrics['examples']} "
                f"{metrics['scored_on']} examples",
            )
        )
        rows.append(("loss", f"{metrics['loss']:.4f}"))
    else:
        rows.append(("accuracy", "not known: train only, no test split"))
    model = os.path.join(output, "model.keras")
    rows += [
        ("results", output),
        (
            "convert",
            shlex.join(
                [
                    "hub-export",
                    "convert",
                    model,
                    os.path.join(output, "saved_model"),
                ]
            ),
        ),
        (
            "publish",
            shlex.join(
                [
                    "hub-export",
                    "publish",
                    model,
                    "--repository",
                    "hub",
                    "--handle",
                    _handle(prepared),
                ]
            ),
        ),
    ]
    return rows


def _handle(prepared) -> str:
    """A handle that one's own model may have."""
    kind, colon, place = prepared.dataset.name.partition(":")
    name = kind
    if colon and kind in ("folder", "csv"):
        base = os.path.basename(os.path.abspath(place))
        name = os.path.splitext(base)[0] if kind == "csv" else base
    kept = [c.lower() if c.isascii() and c.isalnum() else "-" for c in name]
    plain = "-".join(filter(None, "".join(kept).split("-")))[:60]
    if not plain or plain.isdigit():
        plain = f"pictures-{plain}".strip("-")
    return f"me/bit/{plain}_classification"


def _print(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 1
    for name, value in rows:
        print(f"{name + ':':{width}} {value}")
    sys.stdout.flush()


def _require_output(output: str, restart: bool) -> None:
    """Refuses a directory that holds something else, or a result to keep.

    Raises:
      TrainingError: it does.
      BitTfError: it is no directory, or cannot be written to.
    """
    program.require_directory(output)
    if not os.path.isdir(output):
        return
    found = _visible(output)
    # Listed later: of several workers another may just make it.
    if not found or _has_state(output):
        return
    results = [name for name in _RESULTS if name in found]
    if not results or set(found) - set(_MADE):
        other = next((name for name in found if name not in _MADE), found[0])
        raise errors.TrainingError(
            "--output is a new or empty directory, or that of an earlier run. "
            f"Received: {output!r}, which has {errors.brief(other)}"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}. "
            "Name another."
        )
    if not restart:
        raise errors.TrainingError(
            "A result is replaced only if that is asked for. Received: "
            f"{output!r}, which has {results[0]!r} and no state to go on from. "
            "Name another, or discard what is there with --restart."
        )


def _visible(directory: str) -> list[str]:
    return sorted(
        name for name in os.listdir(directory) if not name.startswith(".")
    )


def _has_state(output: str) -> bool:
    """Whether there is a folder "state" with what a run has there."""
    folder = os.path.join(output, "state")
    return os.path.isdir(folder) and set(_visible(folder)) <= set(_STATE)


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            "must be a regular expression, such as 'root_block|block[1-3]', "
            f"not {text!r} ({error})"
        ) from error
    return text


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(
            f"must be between 0 and 1, such as 0.1, not {text}"
        )
    return number


def _positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a positive number, not {text}"
        )
    return number


def _alpha(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a number of 0 or more, not {text}"
        )
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(
            f"must be from 0 to 2147483647, not {text}"
        )
    return number
