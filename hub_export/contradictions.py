"""Where a description is not true of the graph that it describes."""

import math
import re
from collections.abc import Iterator
from typing import Any

from bit_tf import errors, labels, variants
from hub_export.card import TASKS, Card
from hub_export.description import recommended_preset
from hub_export.entry import Entry, Graph

__all__ = ["contradictions", "mistyped"]

_DTYPE = re.compile(r"\b(?:b?float\d+|u?int\d+|complex\d+|bool|string)\b")
_SHAPE = re.compile(r"\[([\w -]+(?:,[\w -]+)+)\]")
_CLASSIFICATION = "_classification"


def contradictions(entry: Entry) -> list[str]:
    """Where a description is not true of the graph that it describes.

    Compares the card, and the handle's ending, with what a fresh process found
    in the SavedModel. What a card does not state is not compared; nor is a
    signature or endpoint that the graph has not.

    Returns:
      A sentence for each contradiction; [] if there is none.
    """
    card, graph = entry.card, entry.graph
    return mistyped(entry) or [
        *_of_card(entry),
        *_of_input(card, graph),
        *_of_outputs(card, graph),
        *_of_labels(card, graph),
        *_of_parity(graph),
    ]


def mistyped(entry: Entry) -> list[str]:
    """Values of other types than an entry has, as a file may hold.

    Returns:
      A sentence for each; [] if there is none.
    """
    return list(_mistyped(entry))


def _mistyped(entry: Entry) -> Iterator[str]:
    publication, card = entry.publication, entry.card
    provenance, graph = entry.provenance, entry.graph
    optional = type(None)
    parents = [
        (f"provenance.parents.{name}", getattr(parent, name), kinds)
        for parent in provenance.parents
        for name, kinds in (("handle", (str,)), ("sha256", (str, optional)))
    ]
    for where, value, kinds in (
        *parents,
        ("description", publication.description, (str,)),
        ("license", publication.license, (str, optional)),
        ("published", entry.published, (str,)),
        ("provenance.source", provenance.source, (str, optional)),
        ("provenance.name", provenance.name, (str, optional)),
        ("provenance.numerics", provenance.numerics, (str, optional)),
        (
            "provenance.numerics_chosen",
            provenance.numerics_chosen,
            (str, optional),
        ),
        ("provenance.sha256", provenance.sha256, (str, optional)),
        ("provenance.format", provenance.format, (str, optional)),
        ("provenance.versions", provenance.versions, (dict,)),
        ("architecture", card.architecture, (str,)),
        ("feature_dim", card.feature_dim, (int,)),
        ("num_classes", card.num_classes, (int,)),
        ("params", card.params, (int,)),
        ("task", card.task, (str,)),
        ("input", card.input, (str,)),
        ("output", card.output, (str,)),
        ("probabilities", card.probabilities, (str, optional)),
        ("labels", card.labels, (str, optional)),
        ("output_stride", card.output_stride, (int, optional)),
        ("numerics", card.numerics, (dict,)),
        ("preset", card.preset, (dict, optional)),
        ("graph.outputs", graph.outputs, (int,)),
        ("graph.params", graph.params, (int,)),
        ("graph.variables", graph.variables, (int,)),
        ("graph.trainable_variables", graph.trainable_variables, (int,)),
        ("graph.regularization_losses", graph.regularization_losses, (int,)),
        ("graph.labels", graph.labels, (int, optional)),
        ("graph.relative_error", graph.relative_error, (int, float, optional)),
        ("graph.tolerance", graph.tolerance, (int, float, optional)),
    ):
        if type(value) not in kinds:
            names = " or ".join(
                "null" if kind is optional else kind.__name__ for kind in kinds
            )
            yield f"{where} must be {names}. Received: {errors.brief(value)}."
    for where, values in (
        ("datasets", publication.datasets),
        ("provenance.extra_arrays", provenance.extra_arrays),
        ("provenance.notes", provenance.notes),
        ("citations", card.citations),
        ("graph.dtypes", graph.dtypes),
    ):
        if not all(isinstance(value, str) for value in values):
            yield f"{where} must be strings. Received: {errors.brief(values)}."
    try:
        recommended_preset(card)
    except (TypeError, ValueError) as error:
        yield f"preset must be null or a presets.Preset: {error}"
    shapes = [("graph.input_shape", graph.input_shape)]
    shapes += [(f"graph.endpoints.{k}", v) for k, v in graph.endpoints.items()]
    shapes += [
        (f"graph.signatures.{name}.{output}", shape)
        for name, outputs in graph.signatures.items()
        for output, shape in outputs.items()
    ]
    for where, shape in shapes:
        if not all(size is None or type(size) is int for size in shape):
            yield (
                f"{where} must be of numbers and null. "
                f"Received: {errors.brief(shape)}."
            )


def _differs(what: str, said: Any, found: Any) -> Iterator[str]:
    if said != found:
        yield f"The card says {what} {said}. The graph has {found}."


def _of_card(entry: Entry) -> Iterator[str]:
    """The card in itself, and with the handle and its architecture."""
    card, graph = entry.card, entry.graph
    if card.num_classes < 0:
        yield f"num_classes must be 0 or more. Received: {card.num_classes}."
    head = bool(card.num_classes)
    if card.task != TASKS[head]:
        yield (
            f"The task of a model with num_classes {card.num_classes} is "
            f"{TASKS[head]!r}. The card says {card.task!r}."
        )
    if entry.handle.name.endswith(_CLASSIFICATION) and not head:
        yield (
            f"The handle {entry.handle} ends in {_CLASSIFICATION!r}. The card "
            "says num_classes 0, features."
        )
    wanted = ("softmax", "sigmoid") if head else (None,)
    if card.probabilities not in wanted:
        yield (
            f"With num_classes {card.num_classes}, probabilities must be "
            f"{' or '.join(map(repr, wanted))}. "
            f"The card says {card.probabilities!r}."
        )
    yield from _differs("params", card.params, graph.params)
    if card.architecture == "custom":
        return
    row = variants.ARCHITECTURES.get(card.architecture)
    if row is None:
        yield (
            f"The architecture must be 'custom' or one of "
            f"{', '.join(variants.ARCHITECTURES)}. The card says "
            f"{errors.brief(card.architecture)}."
        )
        return
    if card.output_stride is None:
        yield f"{row.name} has an output stride. The card says none."
    for what, value, fact in (
        ("feature_dim", card.feature_dim, row.feature_dim),
        ("params", card.params, row.count_params(card.num_classes)),
    ):
        if value != fact:
            yield (
                f"The {what} of {row.name} with num_classes "
                f"{card.num_classes} is {fact}. The card says {value}."
            )


def _of_input(card: Card, graph: Graph) -> Iterator[str]:
    dtypes = sorted(set(_DTYPE.findall(card.input)))
    if dtypes != sorted(graph.dtypes):
        yield (
            f"The card says that pictures are {', '.join(dtypes) or 'of no'} "
            f"dtype. The graph takes {', '.join(graph.dtypes) or 'none'}."
        )
    shape = _shape(card.input)
    if shape is None:
        yield (
            "The card's input states a shape, such as [n, height, width, 3]. "
            f"Received: {errors.brief(card.input)}."
        )
    else:
        yield from _differs("the input's shape is", shape, graph.input_shape)


def _of_outputs(card: Card, graph: Graph) -> Iterator[str]:
    outputs = card.num_classes or card.feature_dim
    yield from _differs("the outputs are", outputs, graph.outputs)
    kind = "logits" if card.num_classes else "features"
    if _shape(card.output) != (None, outputs) or kind not in card.output:
        yield (
            f"The card's output is {kind} [n, {outputs}]. "
            f"The card says {card.output!r}."
        )
    last = {
        ("serving_default", "output_1"): outputs,
        ("image_feature_vector", "features"): card.feature_dim,
        ("image_classification", "logits"): card.num_classes,
        ("image_classification", "probabilities"): card.num_classes,
    }
    for (signature, output), size in last.items():
        shape = graph.signatures.get(signature, {}).get(output)
        if shape is not None:
            what = f"{output} of signature {signature} is"
            yield from _differs(what, (None, size), shape)
    for endpoint, size in (
        ("pre_logits", card.feature_dim),
        ("logits", card.num_classes),
    ):
        shape = graph.endpoints.get(endpoint)
        if shape is not None:
            what = f"the endpoint {endpoint} is"
            yield from _differs(what, (None, size), shape)


def _of_labels(card: Card, graph: Graph) -> Iterator[str]:
    if (card.labels is None) != (graph.labels is None):
        yield from _differs("labels are", card.labels, graph.labels)
    if graph.labels is not None and graph.labels != card.num_classes:
        yield (
            f"The card says num_classes {card.num_classes}. The SavedModel "
            f"has {graph.labels} labels."
        )
    count = labels.LABEL_SETS.get(card.labels or "")
    if count is not None and count != card.num_classes:
        yield (
            f"The label set {card.labels!r} has {count} classes. The card says "
            f"num_classes {card.num_classes}."
        )


def _of_parity(graph: Graph) -> Iterator[str]:
    if graph.trainable_variables > graph.variables:
        yield (
            f"A graph of {graph.variables} variables has no "
            f"{graph.trainable_variables} that are trainable."
        )
    error, tolerance = graph.relative_error, graph.tolerance
    if (error is None) != (tolerance is None):
        yield (
            "A relative error has a tolerance. Received: an error of "
            f"{error} and a tolerance of {tolerance}."
        )
    elif error is not None and not (
        error <= (tolerance or 0) and math.isfinite(error)
    ):
        yield (
            f"The relative error to the golden values may be {tolerance}. "
            f"Received: {error}."
        )


def _shape(text: str) -> tuple[int | None, ...] | None:
    """The first shape in a text, such as [n, 2048] → (None, 2048)."""
    match = _SHAPE.search(text)
    if match is None:
        return None
    sizes = (size.strip() for size in match[1].split(","))
    return tuple(int(size) if size.isdigit() else None for size in sizes)
