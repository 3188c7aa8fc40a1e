import dataclasses

import pytest

from bit_tf import hyperrule

SHORT = (100, 200, 300, 400, 500)
MEDIUM = (500, 3000, 6000, 9000, 10_000)
LONG = (500, 6000, 12_000, 18_000, 20_000)


@pytest.mark.parametrize(
    ("examples", "supports", "alpha"),
    [
        (1, SHORT, 0),
        (19_999, SHORT, 0),
        (20_000, MEDIUM, 0.1),
        (499_999, MEDIUM, 0.1),
        (500_000, LONG, 0.1),
        (14_000_000, LONG, 0.1),
    ],
)
def test_schedule_and_mixup(examples, supports, alpha):
    assert hyperrule.schedule(examples) == supports
    assert hyperrule.mixup_alpha(examples) == alpha


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 0.003 / 100),
        (99, 0.003 * 0.99),
        (100, 0.003),
        (200, 0.003),
        (201, 0.0003),
        (300, 0.0003),
        (301, 0.00003),
        (400, 0.00003),
        (401, 0.000003),
        (499, 0.000003),
    ],
)
def test_learning_rate_at_every_boundary(step, rate):
    found = hyperrule.learning_rate(step, SHORT)
    assert found == pytest.approx(rate, rel=1e-12, abs=0)


def test_learning_rate_of_long_schedules():
    for supports in (MEDIUM, LONG):
        warm_up, first, second, third, end = supports
        for step, rate in (
            (warm_up - 1, 0.003 * (warm_up - 1) / warm_up),
            (warm_up, 0.003),
            (first, 0.003),
            (first + 1, 3e-4),
            (second + 1, 3e-5),
            (third, 3e-5),
            (third + 1, 3e-6),
            (end - 1, 3e-6),
        ):
            found = hyperrule.learning_rate(step, supports)
            assert found == pytest.approx(rate), step


@pytest.mark.parametrize("step", [-1, 500, 501, float("nan")])
def test_steps_outside_of_the_schedule(step):
    with pytest.raises(ValueError, match="from 0 to 499"):
        hyperrule.learning_rate(step, SHORT)


@pytest.mark.parametrize(
    ("sides", "options", "resize", "crop"),
    [
        ((28, 28), {}, 160, 128),
        ((95, 97), {}, 160, 128),  # 9215 pixels
        ((96, 96), {}, 512, 480),
        ((96, 96), {"source": "paper"}, 448, 384),
        ((95, 96), {"source": "paper"}, 160, 128),
        ((300, 400), {"source": "paper"}, 448, 384),
        (
            (300, 400),
            {"source": "paper", "architecture": "R152x4"},
            512,
            480,
        ),
        (
            (32, 32),
            {"source": "paper", "architecture": "R152x4"},
            160,
            128,
        ),
        (
            (300, 400),
            {"source": "paper", "architecture": "R152x2"},
            448,
            384,
        ),
        ((300, 400), {"architecture": "R50x1"}, 512, 480),
        ((1, 9215), {}, 160, 128),
        ((1, 9216), {}, 512, 480),
    ],
)
def test_resolution(sides, options, resize, crop):
    found = hyperrule.resolution(*sides, **options)
    assert dataclasses.astuple(found) == (resize, crop)


@pytest.mark.parametrize(
    ("batch_size", "supports"),
    [
        (512, SHORT),
        (256, (200, 400, 600, 800, 1000)),
        (1024, (50, 100, 150, 200, 250)),
        (64, (800, 1600, 2400, 3200, 4000)),
        # To the nearest step, and every phase has one.
        (600, (85, 171, 256, 341, 427)),
        (10**9, (1, 2, 3, 4, 5)),
    ],
)
def test_steps_of_another_batch(batch_size, supports):
    assert hyperrule.scaled_steps(SHORT, batch_size) == supports


def test_learning_rate_of_another_batch():
    assert hyperrule.scaled_learning_rate(512) == 0.003
    assert hyperrule.scaled_learning_rate(128) == 0.00075
    assert hyperrule.scaled_learning_rate(1024, 0.01) == 0.02


def test_the_whole_rule():
    rule = hyperrule.derive(50_000, 32, 32)
    assert rule == hyperrule.Rule(
        examples=50_000,
        resolution=hyperrule.Resolution(160, 128),
        mixup_alpha=0.1,
        batch_size=512,
        supports=MEDIUM,
        peak_learning_rate=0.003,
    )
    assert rule.steps == 10_000
    small = hyperrule.derive(50, 300, 300, batch_size=128, source="paper")
    assert small.resolution == hyperrule.Resolution(448, 384)
    assert (small.mixup_alpha, small.steps) == (0, 2000)
    assert small.learning_rate(200) == pytest.approx(0.00075 / 2)
    assert small.learning_rate(1999) == pytest.approx(0.00075 / 1000)
    with pytest.raises(ValueError, match="from 0 to 1999"):
        small.learning_rate(2000)


@pytest.mark.parametrize(
    ("side", "batch_size", "replicas", "parts"),
    [
        (480, 512, 1, 16),
        (480, 512, 4, 4),
        (480, 32, 1, 1),
        (480, 33, 1, 2),
        (480, 2, 4, 1),
        (32, 512, 1, 2),
        (32, 450, 1, 1),
        (32, 451, 1, 2),
    ],
)
def test_micro_batches(side, batch_size, replicas, parts):
    rule = hyperrule.derive(1000, side, side, batch_size=batch_size)
    assert hyperrule.micro_batches(rule, replicas) == parts


def test_micro_batches_of_no_device():
    with pytest.raises(ValueError, match="replicas must be 1 or more"):
        hyperrule.micro_batches(hyperrule.derive(1000, 32, 32), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 0}, "examples must be 1 or more. Received: 0."),
        ({"examples": float("nan")}, "examples must be 1 or more"),
        ({"height": 0}, "height"),
        ({"width": -3}, "width"),
        ({"batch_size": 0}, "batch_size"),
        ({"base_learning_rate": 0}, "a positive number. Received: 0."),
        ({"base_learning_rate": float("inf")}, "a positive number"),
        ({"source": "blog"}, "Sources are code, paper. Received: 'blog'."),
    ],
)
def test_numbers_out_of_range(change, message):
    options = {"examples": 1, "height": 100, "width": 100} | change
    with pytest.raises(ValueError, match=message):
        hyperrule.derive(**options)
