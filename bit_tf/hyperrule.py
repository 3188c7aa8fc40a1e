"""BiT-HyperRule: how long, how fast, how large and how mixed to fine-tune.

Everything follows from the number of training examples and the size of their
pictures. Pure functions of numbers. SGD with momentum `MOMENTUM` and without
weight decay, from a head that starts at zero.

Source: arXiv:1912.11370, §3.3; google-research/big_transfer,
bit_hyperrule.py. Where the two differ, the code is followed, and the
difference is said.
"""

import dataclasses
import math

__all__ = [
    "AT_ONCE",
    "BASE_LEARNING_RATE",
    "BATCH_SIZE",
    "MOMENTUM",
    "Resolution",
    "Rule",
    "derive",
    "learning_rate",
    "micro_batches",
    "mixup_alpha",
    "resolution",
    "scaled_learning_rate",
    "scaled_steps",
    "schedule",
]

BASE_LEARNING_RATE = 0.003
BATCH_SIZE = 512
MOMENTUM = 0.9
# Pictures of 480 × 480 pixels that a device computes at once by default.
AT_ONCE = 32

# Fewer examples than the first number: the steps after which the warm-up ends,
# the learning rate is divided by ten (three times), and training ends. For the
# shortest, the paper's text has 30 %, 60 % and 90 % of the steps.
_SCHEDULES = (
    (20_000, (100, 200, 300, 400, 500)),
    (500_000, (500, 3_000, 6_000, 9_000, 10_000)),
    (math.inf, (500, 6_000, 12_000, 18_000, 20_000)),
)
_MIXUP_FROM = 20_000
_MIXUP_ALPHA = 0.1
# Pixels of a picture from which on it is large.
_LARGE = 96 * 96
_DECAY = 10.0


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Sides of squares, in pixels.

    Attributes:
      resize: to which training pictures are resized.
      crop: cut from them at random; to which test pictures are resized.
    """

    resize: int
    crop: int


_SMALL_PICTURES = Resolution(160, 128)
_LARGE_PICTURES = {
    "code": Resolution(512, 480),
    "paper": Resolution(448, 384),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What BiT-HyperRule says for one dataset.

    Attributes:
      examples: for training.
      resolution: of pictures.
      mixup_alpha: of Beta(α, α), from which mixup's λ is drawn; 0 mixes none.
      batch_size: examples a step, over all devices.
      supports: steps after which the warm-up ends, the learning rate is
        divided by ten (three times), and training ends.
      peak_learning_rate: that at the end of the warm-up.
    """

    examples: int
    resolution: Resolution
    mixup_alpha: float
    batch_size: int
    supports: tuple[int, ...]
    peak_learning_rate: float

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.supports[-1]

    def learning_rate(self, step: float) -> float:
        """That of step 0, 1, …, steps − 1 (see `learning_rate`)."""
        return learning_rate(step, self.supports, self.peak_learning_rate)


def schedule(examples: int) -> tuple[int, ...]:
    """Steps at a batch of 512 after which something changes.

    Args:
      examples: for training, 1 or more.

    Returns:
      (end of the warm-up, three decays, end)

    Raises:
      ValueError: there are no examples.
    """
    _require("examples", examples)
    return next(steps for below, steps in _SCHEDULES if examples < below)


def learning_rate(
    step: float, supports: tuple[int, ...], peak: float = BASE_LEARNING_RATE
) -> float:
    """The learning rate of a step, counted from 0.

    From 0 linearly to `peak` at `supports[0]`; divided by ten after each of
    the next three: step s itself still has the larger one. Warm-up is the
    code's, the paper's text has none.

    Args:
      step: 0 or more; from `supports[-1]` on, training is over.
      supports: of `schedule`, or `scaled_steps` of it.
      peak: that at the end of the warm-up.

    Raises:
      ValueError: the step is not in the schedule.
    """
    warm_up, *decays, end = supports
    if not 0 <= step < end:
        raise ValueError(
            f"Steps go from 0 to {end - 1} in this schedule. Received: {step}."
        )
    if step < warm_up:
        return peak * step / warm_up
    return peak / _DECAY ** sum(support < step for support in decays)


def scaled_learning_rate(
    batch_size: int, base: float = BASE_LEARNING_RATE
) -> float:
    """The peak for a batch of another size than 512: in proportion to it.

    Raises:
      ValueError: the batch is empty, or the rate is no positive number.
    """
    _require("batch_size", batch_size)
    if not 0 < base < math.inf:
        raise ValueError(
            f"A learning rate is a positive number. Received: {base!r}."
        )
    return base * batch_size / BATCH_SIZE


def scaled_steps(supports: tuple[int, ...], batch_size: int) -> tuple[int, ...]:
    """A schedule for a batch of another size, that sees as many examples.

    Each support is multiplied by 512 / batch_size and rounded, and is at least
    one step after the one before.

    Raises:
      ValueError: the batch is empty.
    """
    _require("batch_size", batch_size)
    found: list[int] = []
    for support in supports:
        last = found[-1] if found else 0
        found.append(max(round(support * BATCH_SIZE / batch_size), last + 1))
    return tuple(found)


def resolution(
    height: float,
    width: float,
    *,
    source: str = "code",
    architecture: str | None = None,
) -> Resolution:
    """The sides to which pictures are resized and cropped.

    Pictures of fewer pixels than 96 × 96 go to 160 and 128; those of 96 × 96
    are large.

    Args:
      height, width: of the dataset's pictures, in pixels.
      source: for large pictures, "code" is 512 and 480 for all models; "paper"
        is 448 and 384, and for R152x4 512 and 480.
      architecture: a name in variants.ARCHITECTURES; only the paper asks.

    Raises:
      ValueError: a side is not positive, or there is no such source.
    """
    _require("height", height)
    _require("width", width)
    if source not in _LARGE_PICTURES:
        raise ValueError(
            f"Sources are {', '.join(_LARGE_PICTURES)}. Received: {source!r}."
        )
    if height * width < _LARGE:
        return _SMALL_PICTURES
    if architecture == "R152x4":
        source = "code"
    return _LARGE_PICTURES[source]


def mixup_alpha(examples: int) -> float:
    """α of mixup's Beta(α, α); 0, which is no mixup, below 20 000 examples.

    Raises:
      ValueError: there are no examples.
    """
    _require("examples", examples)
    return _MIXUP_ALPHA if examples >= _MIXUP_FROM else 0.0


def derive(
    examples: int,
    height: float,
    width: float,
    *,
    batch_size: int = BATCH_SIZE,
    base_learning_rate: float = BASE_LEARNING_RATE,
    source: str = "code",
    architecture: str | None = None,
) -> Rule:
    """The whole rule.

    Args:
      examples: for training, 1 or more.
      height, width: of the dataset's pictures, in pixels.
      batch_size: examples a step; another one than 512 scales steps and
        learning rate.
      base_learning_rate: that at a batch of 512.
      source, architecture: see `resolution`.

    Raises:
      ValueError: a number is out of its range.
    """
    return Rule(
        examples=examples,
        resolution=resolution(
            height, width, source=source, architecture=architecture
        ),
        mixup_alpha=mixup_alpha(examples),
        batch_size=batch_size,
        supports=scaled_steps(schedule(examples), batch_size),
        peak_learning_rate=scaled_learning_rate(batch_size, base_learning_rate),
    )


def micro_batches(rule: Rule, replicas: int = 1) -> int:
    """Into how many parts each device's batch is divided to fit its memory.

    So many that AT_ONCE pictures of 480 × 480 pixels, or as many pixels, are
    computed at once. No part of the published rule: it changes no result.

    Args:
      rule: its batch, over all devices, and its crop.
      replicas: devices among which a batch is divided, 1 or more.

    Raises:
      ValueError: there are no devices.
    """
    _require("replicas", replicas)
    at_once = max(1, int(AT_ONCE * (480 / rule.resolution.crop) ** 2))
    return math.ceil(max(1, rule.batch_size // replicas) / at_once)


def _require(name: str, value: float) -> None:
    if not 1 <= value < math.inf:
        raise ValueError(f"{name} must be 1 or more. Received: {value!r}.")
