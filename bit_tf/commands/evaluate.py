"""`bit-tf evaluate`: scores of models on labelled pictures."""

import argparse
import os
import sys

from bit_tf import errors, files, hyperrule, presets
from bit_tf.commands import program

__all__ = ["register"]

# Classes of which the table shows all; of more, as many that are worst.
_CLASSES = 20


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="scores of models on labelled pictures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Scores a classifier on a dataset: accuracy, per class, and calibration.
Instead, with
  --probe  its features by a linear classifier of few examples a class;
  --knn    its features by the vote of their nearest neighbours;
  --real   a classifier of ImageNet's 1000 classes by the labels of ReaL;
  --vtab   by fine-tuning on tasks of VTAB, 1000 examples each.""",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a fine-tuned .keras file, a checkpoint or the name of a "
        "published one, a TF-Hub handle, a SavedModel directory or a .tar.gz "
        "archive; for scores of a classifier, with a head",
    )
    parser.add_argument(
        "--dataset",
        help="folder:DIR, csv:FILE, or a name of TensorFlow Datasets, such as "
        "cifar10 or oxford_flowers102:2.*",
    )
    parser.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        help="what is scored (default: test, or else validation)",
    )
    parser.add_argument(
        "--preset",
        choices=[row.name for row in presets.PRESETS.values() if row.size],
        help="how pictures are prepared (default: as the model says, or else "
        "'big_transfer eval'; for features 'big_vision fewshot')",
    )
    parser.add_argument(
        "--batch-size",
        type=program.positive,
        help="pictures at a time (32); with --vtab examples a step (512)",
    )
    program.add_dataset_options(parser)
    features = parser.add_argument_group("features")
    features.add_argument("--probe", action="store_true", help="see above")
    features.add_argument(
        "--shots",
        type=program.positive,
        nargs="+",
        metavar="K",
        help="examples a class (1 5 10 25; of these, those for which every "
        "class has enough)",
    )
    features.add_argument(
        "--seeds",
        type=program.positive,
        metavar="N",
        help="subsets for each K (3)",
    )
    features.add_argument(
        "--l2",
        type=_positive_number,
        nargs="+",
        help="penalty of the linear classifier (1024); of several, each "
        "subset takes the best on training examples outside of it",
    )
    features.add_argument("--knn", action="store_true", help="see above")
    features.add_argument(
        "--k",
        type=program.positive,
        nargs="+",
        help="neighbours that vote (1 5 20, as far as there are so many)",
    )
    features.add_argument(
        "--temperature",
        type=_positive_number,
        help="weighs votes by exp(similarity / TEMPERATURE), such as 0.07 "
        "(default: all the same)",
    )
    parser.add_argument("--real", action="store_true", help="see above")
    vtab = parser.add_argument_group("VTAB")
    vtab.add_argument(
        "--vtab", nargs="+", metavar="TASK", help="names of tasks, or all"
    )
    vtab.add_argument(
        "--steps",
        type=program.positive,
        help="of training a task (default: as BiT-HyperRule says)",
    )
    vtab.add_argument(
        "--micro-batches",
        type=program.positive,
        metavar="N",
        help="parts of each device's batch, computed one after the other to "
        "save memory (default: for each task so many that "
        f"{hyperrule.AT_ONCE} pictures of 480 × 480 pixels, or as many "
        "pixels, are computed at once)",
    )
    vtab.add_argument("--seed", type=_natural, help="of training (0)")
    vtab.add_argument(
        "--dry-run",
        action="store_true",
        help="only check that TensorFlow Datasets has what the tasks need; "
        "nothing is downloaded",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="where results are written: metrics.json and charts (needs the "
        "extra 'plot'); features.json and .md of --probe and --knn; "
        "results.json and .md of --vtab",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, not a table"
    )
    program.add_relocate(parser)
    parser.set_defaults(run=run, refuse=parser.error)


def _positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(
            f"must be a positive number, not {text}"
        )
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


def run(args) -> int:
    _check(args)
    if args.output is not None:
        _require_output(args.output)
    if args.vtab:
        return _vtab(args)
    if args.probe or args.knn:
        return _features(args)
    return _classifier(args)


def _check(args) -> None:
    """Refuses arguments that do not go together, with exit code 2."""
    kinds = {
        "--probe or --knn": args.probe or args.knn,
        "--real": args.real,
        "--vtab": bool(args.vtab),
    }
    asked = [name for name, is_asked in kinds.items() if is_asked]
    if len(asked) > 1:
        args.refuse(f"{' and '.join(asked)} cannot be asked for at once")
    if not args.dataset and not args.vtab and not args.real:
        args.refuse("--dataset is required, but for --real and --vtab")
    for option, is_given, is_used, user in (
        ("--dataset", args.dataset, not args.vtab, "other scores than --vtab"),
        ("--preset", args.preset, not args.vtab, "other scores than --vtab"),
        (
            "--bad-images",
            args.bad_images,
            not args.vtab and not args.real,
            "other scores than --vtab and --real",
        ),
        ("--split", args.split, args.dataset and not args.real, "--dataset"),
        ("--shots", args.shots, args.probe, "--probe"),
        ("--seeds", args.seeds, args.probe, "--probe"),
        ("--l2", args.l2, args.probe, "--probe"),
        ("--k", args.k, args.knn, "--knn"),
        ("--temperature", args.temperature, args.knn, "--knn"),
        ("--steps", args.steps, args.vtab, "--vtab"),
        ("--micro-batches", args.micro_batches, args.vtab, "--vtab"),
        ("--seed", args.seed is not None, args.vtab, "--vtab"),
        ("--dry-run", args.dry_run, args.vtab, "--vtab"),
    ):
        if is_given and not is_used:
            args.refuse(f"{option} is for {user}")


def _classifier(args) -> int:
    program.quiet_tensorflow()
    from bit_tf import charts, evaluate

    if args.output:
        charts.require()
    common = {
        "preset": args.preset,
        "batch_size": args.batch_size or 32,
    }
    if args.real:
        from bit_tf import imagenet_real

        found = imagenet_real.score(
            args.model,
            dataset=args.dataset or imagenet_real.DATASET,
            data_dir=args.data_dir,
            manual_dir=args.manual_dir,
            **common,
        )
    else:
        found = evaluate.evaluate(
            args.model, _dataset(args), split=args.split, **common
        )
    text = evaluate.to_json(found.report)
    if args.output:
        _write(args.output, "metrics.json", text)
        items = evaluate.mistake_items(
            found.split,
            found.outputs,
            found.labels,
            activation=found.activation,
        )
        evaluate.draw(found.report, items, args.output)
    sys.stdout.write(text if args.json else _table(found.report))
    return 0


def _features(args) -> int:
    program.quiet_tensorflow()
    from bit_tf import feature_scores, probe

    penalties = args.l2 or [probe.L2]
    result = feature_scores.score(
        args.model,
        _dataset(args),
        split=args.split,
        preset=args.preset or feature_scores.DEFAULT_PRESET,
        batch_size=args.batch_size or 32,
        shots=args.shots if args.probe else (),
        seeds=range(args.seeds or 3),
        l2=penalties[0] if len(penalties) == 1 else penalties,
        neighbours=args.k if args.knn else (),
        temperature=args.temperature,
    )
    return _show(args, result, feature_scores.markdown(result))


def _vtab(args) -> int:
    program.quiet_tensorflow()
    from bit_tf import vtab

    if args.dry_run:
        rows = vtab.check(args.vtab, data_dir=args.data_dir)
        _show(args, {"tasks": rows}, _checks(rows), written=False)
        return 0 if all(row["ok"] for row in rows) else 1
    result = vtab.run(
        args.model,
        args.vtab,
        output=args.output,
        data_dir=args.data_dir,
        manual_dir=args.manual_dir,
        batch_size=args.batch_size or 512,
        micro_batches=args.micro_batches,
        steps=args.steps,
        seed=args.seed or 0,
        strategy=vtab.strategy(),
    )
    return _show(args, result, vtab.markdown(result), written=False)


def _dataset(args):
    from bit_tf import data

    return data.open_dataset(
        args.dataset,
        data_dir=args.data_dir,
        manual_dir=args.manual_dir,
        bad_images=args.bad_images or "raise",
    )


def _show(args, result, markdown: str, written: bool = True) -> int:
    from bit_tf import evaluate

    text = evaluate.to_json(result)
    if args.output and written:
        _write(args.output, "features.json", text)
        _write(args.output, "features.md", markdown)
    sys.stdout.write(text if args.json else markdown)
    return 0


def _require_output(output: str) -> None:
    """Refuses what is no directory, or that of a fine-tuned model.

    Raises:
      BitTfError: as said, or nothing can be written there.
    """
    program.require_directory(output)
    trained = [
        name
        for name in ("state", "model.keras")
        if os.path.lexists(os.path.join(output, name))
    ]
    if trained:
        raise errors.BitTfError(
            "--output is a directory of its own. Received: "
            f"{output!r}, where 'bit-tf finetune' has written {trained[0]!r} "
            "and its own results. Name another."
        )


def _write(directory: str, name: str, text: str) -> None:
    os.makedirs(directory, exist_ok=True)
    with files.new_file(os.path.join(directory, name)) as file:
        file.write(text.encode())


def _table(report) -> str:
    """A classifier's report for people."""
    lines = [
        f"{report['model']['source']} on {report['dataset']}",
        f"{report['examples']} pictures of {report['split']}, "
        f"{len(report['per_class'])} classes, matched "
        f"{report['classes_matched']}, preset {report['preset']['name']!r}",
        "",
    ]
    numbers = {
        "top-1": _percent(report["top1"]),
        "top-5": _percent(report["top5"]),
        "loss": f"{report['loss']:.4f} nats",
        "calibration error": f"{report['calibration']['ece']:.4f}",
        "Brier score": f"{report['calibration']['brier']:.4f}",
    }
    if "real" in report:
        real = report["real"]
        numbers["ReaL top-1"] = (
            f"{_percent(real['top1'])}, of {real['examples']} with a label"
        )
    lines += [f"  {name:18} {number}" for name, number in numbers.items()]
    classes = report["per_class"]
    title = "class"
    if len(classes) > _CLASSES:
        title = f"the {_CLASSES} worst classes"
        present = [row for row in classes if row["examples"]]
        classes = sorted(present, key=lambda row: row["top1"])[:_CLASSES]
    width = min(40, max(len(title), *(len(row["name"]) for row in classes)))
    lines += ["", f"  {title:{width}}  examples   top-1  precision"]
    lines += [
        f"  {row['name'][:width]:{width}}  {row['examples']:8}  "
        f"{_percent(row['top1']):>6}  {_percent(row['precision']):>9}"
        for row in classes
    ]
    return "\n".join(lines) + "\n"


def _checks(rows) -> str:
    """What vtab.check found, a line a task."""
    lines = []
    for row in rows:
        sizes = ", ".join(
            f"{name} {size}" for name, size in (row["sizes"] or {}).items()
        )
        verdict = "ok" if row["ok"] else "; ".join(map(str, row["problems"]))
        lines.append(f"{row['task']:24} {verdict}{f' ({sizes})' * bool(sizes)}")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"
