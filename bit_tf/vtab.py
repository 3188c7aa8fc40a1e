"""VTAB-1k: fine-tuning on 19 tasks of a thousand pictures, and a score.

    results = vtab.run("BiT-M-R50x1", ["cifar100", "dtd"], output="vtab")
    print(vtab.markdown(results))

What `run` does is BiT's protocol (arXiv:1912.11370): one rule, BiT-HyperRule,
on all 800 + 200 training pictures of a task, then top-1 of its whole test
split, once. VTAB's own (arXiv:1910.04867), that of its leaderboard, first
tunes each task's hyper-parameters, on the 200. Scores of the two are not of
one kind.
"""

import contextlib
import gc
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from bit_tf import (
    data,
    distribution,
    errors,
    evaluate,
    files,
    finetune,
    hyperrule,
    input_pipeline,
    metrics,
    transfer,
)
from bit_tf.checkpoints import json_files
from bit_tf.vtab_tasks import (
    ALL,
    GROUPS,
    TASKS,
    Example,
    Task,
    check,
    chosen,
    known_examples,
    require_as_tabled,
)

__all__ = ["TASKS", "Task", "check", "load", "markdown", "run", "strategy"]

_RESULTS = "results.json"
# The folder of states of training, one a task.
_UNFINISHED = "unfinished"
_FORMAT = 1


def load(
    task: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    progress: bool = True,
) -> data.Dataset:
    """Opens a task.

    Args:
      task: a name in TASKS.
      data_dir: TFDS' folder of datasets; None is its own.
      manual_dir: where files lie that TFDS cannot download itself.
      download: whether a dataset that is not there is downloaded and prepared.
      progress: whether a bar is shown, on a terminal.

    Returns:
      "train", 800 + 200 pictures, and "test".

    Raises:
      UnknownNameError: there is no such task.
      DatasetError: the dataset is not there, or is not as the table says.
    """
    row = errors.lookup(TASKS, task, "VTAB tasks")
    require_as_tabled([row], data_dir)
    before = known_examples(row, data_dir)
    where: dict[str, Any] = {
        "data_dir": data_dir,
        "manual_dir": manual_dir,
        "download": download,
        "progress": progress,
    }
    dataset = _open(row, before, where)
    after = known_examples(row, data_dir)
    # The version that was downloaded may have other sizes than the table's.
    if row.splits(after) != row.splits(before):
        dataset = _open(row, after, where)
    return dataset


def run(
    source: str | os.PathLike[str],
    tasks: str | Iterable[str] = ALL,
    *,
    output: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    batch_size: int = hyperrule.BATCH_SIZE,
    micro_batches: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    strategy: tf.distribute.Strategy | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tunes a model on each task and scores it on the task's test split.

    Args:
      source: whatever transfer.classifier takes; each task begins with it.
      tasks: names in TASKS, one name, or "all".
      output: a folder for results.json and results.md, which are renewed after
        each task. Tasks that are finished there are not done again, and one
        that was interrupted goes on.
      data_dir, manual_dir, download: see `load`.
      batch_size: examples a step; another one than 512 scales BiT-HyperRule's
        steps and learning rate.
      micro_batches: into how many parts each device's batch is divided, to
        need less memory; as hyperrule.micro_batches says for each task, unless
        given.
      steps: fewer than the rule's, to try things out; the scores are then not
        comparable with others.
      seed: of the order of pictures, crops and flips.
      dtype: a dtype policy, such as "mixed_bfloat16".
      strategy: of the devices of this machine, see `strategy`; the one in
        whose scope this is called, unless given.
      progress: whether bars are shown, on a terminal.

    Returns:
      JSON's types: "settings"; "model", see transfer.describe; "tasks", for
      each finished one its "group", "top1", "top5" and "loss" (see
      metrics.classification), "examples" of the test split, and how it was
      trained; "scores", the mean top-1 of each group and of "all", None unless
      every task of it is finished; "missing", names of the other tasks. All
      shares are in [0, 1]. Finished tasks in `output` are among them, whatever
      `tasks` says.

    Raises:
      UnknownNameError: there is no such task.
      DatasetError: a dataset is not there, or is not as the table says.
      TrainingError: fine-tuning cannot go on, or `output` has results of
        another model or other settings.
      and what transfer.classifier raises.
    """
    rows = chosen(tasks)
    settings = {
        "source": transfer.look(source).source,
        "batch_size": batch_size,
        "steps": steps,
        "seed": seed,
        "dtype": dtype,
    }
    on = tf.distribute.get_strategy() if strategy is None else strategy
    _require_one_machine(distribution.place(on).workers)
    require_as_tabled(rows, data_dir)
    with _folder(output) as folder:
        results = _begin(settings, folder)
        _clean(results, folder)
        todo = [row for row in rows if row.name not in results["tasks"]]
        for number, row in enumerate(todo, 1):
            logging.info("%s, task %d of %d", row.name, number, len(todo))
            with on.scope():
                model = transfer.classifier(source, row.classes, dtype=dtype)
            _require_same_model(results, model, folder)
            dataset = load(
                row.name,
                data_dir=data_dir,
                manual_dir=manual_dir,
                download=download,
                progress=progress,
            )
            results["tasks"][row.name] = _trained(
                row,
                model,
                dataset,
                folder,
                on,
                progress=progress,
                batch_size=batch_size,
                micro_batches=micro_batches,
                steps=steps,
                seed=seed,
                version=check(row.name, data_dir=data_dir)[0]["version"],
            )
            _score(results)
            _write(results, folder)
            _clean(results, folder)
            # Layers and the graphs of their functions refer to each other.
            del model
            gc.collect()
    return results


def strategy() -> tf.distribute.Strategy:
    """That of all devices of this machine, for `run`.

    Raises:
      TrainingError: $TF_CONFIG has several workers, or is malformed.
    """
    # The strategy of several would wait for all of them.
    _require_one_machine(distribution.workers())
    return distribution.strategy()


def markdown(results: Mapping[str, Any]) -> str:
    """What `run` returned as a table: a line a task, and scores by group.

    Args:
      results: of `run`, or read from its results.json.
    """
    done = results["tasks"]
    settings = results["settings"]
    lines = [
        f"VTAB-1k with BiT-HyperRule: {settings['source']}, seed "
        f"{settings['seed']}, batch {settings['batch_size']}",
        "",
        "| task | group | test pictures | top-1 |",
        "|---|---|---:|---:|",
    ]
    lines += [
        f"| {name} | {found['group']} | {found['examples']} "
        f"| {_percent(found['top1'])} |"
        for name, found in done.items()
    ]
    lines += ["", "| score | tasks | mean top-1 |", "|---|---:|---:|"]
    for group, members in _groups().items():
        finished = sum(name in done for name in members)
        lines.append(
            f"| {group} | {finished} of {len(members)} "
            f"| {_percent(results['scores'][group])} |"
        )
    if results["missing"]:
        lines += ["", f"Not done: {', '.join(results['missing'])}."]
    if settings["steps"] is not None:
        lines += [
            "",
            f"Trained for {settings['steps']} steps a task and not by the "
            "rule: not comparable with other scores.",
        ]
    return "\n".join(lines) + "\n"


def _require_one_machine(workers: int) -> None:
    if workers > 1:
        raise errors.TrainingError(
            "VTAB's tasks are small, and are run on one machine. Received: "
            f"{workers} workers. Unset TF_CONFIG, and give each machine tasks "
            "of its own (--vtab TASK …)."
        )


def _open(
    row: Task, examples: Mapping[str, int], where: Mapping[str, Any]
) -> data.Dataset:
    splits = row.splits(examples)
    label, *_ = row.features
    return data.from_tfds(
        row.builder,
        {"train": splits["train800val200"], "test": splits["test"]},
        label=label,
        transform=_transform(row) if row.label_map else None,
        needs=["image", *row.features],
        class_names=row.class_names,
        **where,
    )


def _transform(row: Task):
    """The function of an example: (picture, label)."""

    def transform(example: Example) -> tuple[tf.Tensor, tf.Tensor]:
        assert row.label_map is not None
        picture = example["image"]
        if row.picture_map is not None:
            picture = row.picture_map(picture)
        return picture, row.label_map(example)

    return transform


def _trained(
    row: Task,
    model: keras.Model,
    dataset: data.Dataset,
    folder: pathlib.Path | None,
    on: tf.distribute.Strategy,
    *,
    progress: bool,
    batch_size: int,
    micro_batches: int | None,
    steps: int | None,
    seed: int,
    version: str | None,
) -> dict[str, Any]:
    """Fine-tunes the model and scores it: the results of one task."""
    began = time.monotonic()
    rule = row.rule(batch_size)
    train, test = dataset.splits["train"], dataset.splits["test"]
    history = finetune.finetune(
        model,
        train,
        rule=rule,
        output=folder and folder / _UNFINISHED / row.name,
        seed=seed,
        micro_batches=micro_batches
        or hyperrule.micro_batches(rule, on.num_replicas_in_sync),
        flip=row.flip,
        crop=row.crop,
        strategy=on,
        steps=steps,
        progress=progress,
    )
    outputs, labels = evaluate.predict(
        model,
        test,
        preset=input_pipeline.evaluation_preset(rule.resolution.crop),
        progress=progress,
        strategy=on if on.num_replicas_in_sync > 1 else None,
    )
    measured = metrics.classification(outputs, labels, test.class_names)
    return {
        "group": row.group,
        **{key: measured[key] for key in ("top1", "top5", "loss", "examples")},
        "builder": row.builder,
        "version": version,
        "train_examples": train.size,
        "steps": history.rows[-1]["step"],
        "peak_learning_rate": rule.peak_learning_rate,
        "resize": rule.resolution.resize,
        "crop": rule.resolution.crop,
        "random_flip": row.flip,
        "random_crop": row.crop,
        "seconds": round(time.monotonic() - began, 1),
    }


@contextlib.contextmanager
def _folder(
    output: str | os.PathLike[str] | None,
) -> Iterator[pathlib.Path | None]:
    """The folder of results, which no other process writes to meanwhile."""
    if output is None:
        yield None
        return
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / ".lock", "scores tasks of VTAB there"):
        yield folder


def _begin(
    settings: dict[str, Any], folder: pathlib.Path | None
) -> dict[str, Any]:
    """The results so far, or those of nothing."""
    results: dict[str, Any] = {
        "format": _FORMAT,
        "settings": settings,
        "model": None,
        "tasks": {},
    }
    path = folder and folder / _RESULTS
    if path is not None and path.exists():
        try:
            found = json_files.read_object(path)
            _require_results(found)
        except (ValueError, OSError) as error:
            raise errors.TrainingError(
                f"{path} is written by this command alone. Received: "
                f"something else ({error}). Choose another folder (--output), "
                "or remove the file."
            ) from error
        others = [
            f"{key} {found['settings'].get(key)!r}, not {value!r}"
            for key, value in settings.items()
            if found["settings"].get(key) != value
        ]
        if others:
            raise _other(path, ", ".join(others))
        results = found
    _score(results)
    return results


def _require_results(found: Mapping[str, Any]) -> None:
    """Raises ValueError for what `run` has not written."""
    if found.get("format") != _FORMAT:
        raise ValueError(f"format {found.get('format')!r}, not {_FORMAT}")
    for key in ("settings", "tasks"):
        if not isinstance(found.get(key), dict):
            raise ValueError(f"no object {key!r}")
    for name, task in found["tasks"].items():
        if name not in TASKS:
            raise ValueError(f"no task {name!r}")
        top1 = task.get("top1") if isinstance(task, dict) else None
        if not isinstance(top1, float) or not 0 <= top1 <= 1:
            raise ValueError(f"top1 {top1!r} of {name}")


def _require_same_model(
    results: dict[str, Any], model: keras.Model, folder: pathlib.Path | None
) -> None:
    """Records the source's hash, or refuses another than the one recorded."""
    found = {
        key: value
        for key, value in transfer.describe(model).items()
        if key not in ("parameters", "trainable_parameters")
    }
    if results["model"] not in (None, found):
        raise _other(
            folder / _RESULTS if folder else "", f"model {results['model']}"
        )
    results["model"] = found


def _other(path: Any, what: str) -> errors.TrainingError:
    return errors.TrainingError(
        f"{path}: results of one file are of one model and the same settings. "
        f"Received: a file of {what}. Choose another folder (--output)."
    )


def _groups() -> dict[str, list[str]]:
    """Group → names of its tasks; also "all"."""
    found = {
        group: [name for name, row in TASKS.items() if row.group == group]
        for group in GROUPS
    }
    return found | {ALL: list(TASKS)}


def _score(results: dict[str, Any]) -> None:
    """Fills in "scores" and "missing" from "tasks"."""
    done = results["tasks"]
    results["tasks"] = {name: done[name] for name in TASKS if name in done}
    results["scores"] = {
        group: float(np.mean([done[name]["top1"] for name in members]))
        if all(name in done for name in members)
        else None
        for group, members in _groups().items()
    }
    results["missing"] = [name for name in TASKS if name not in done]


def _write(results: dict[str, Any], folder: pathlib.Path | None) -> None:
    if folder is None:
        return
    for name, text in (
        (_RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n"),
        ("results.md", markdown(results)),
    ):
        with files.new_file(folder / name) as file:
            file.write(text.encode())


def _clean(results: Mapping[str, Any], folder: pathlib.Path | None) -> None:
    """Removes the weights of finished tasks, which would fill the disk."""
    if folder is None:
        return
    unfinished = folder / _UNFINISHED
    for name in results["tasks"]:
        shutil.rmtree(unfinished / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        unfinished.rmdir()


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
