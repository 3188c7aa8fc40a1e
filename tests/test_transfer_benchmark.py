import json

import numpy as np
import pytest

from benchmarks import transfer


def test_table():
    results = [
        transfer.Result(transfer.TRANSFER, 5, 0.01, (0.5, 0.9, 0.7)),
        transfer.Result(transfer.SCRATCH, 5, 0.1, (0.6, 0.6, 0.6)),
        transfer.Result(transfer.PIXELS, 5, None, (0.6, 0.8, 0.9)),
        transfer.Result(transfer.TRANSFER, 10, 0.01, (1.0,)),
    ]
    assert transfer.table(results).splitlines()[2:] == [
        "| 5 | hub layer | 50.0 % | 70.0 % | 90.0 % | 2 of 3 seeds, median "
        "+10.0 |",
        "| 5 | from scratch | 60.0 % | 60.0 % | 60.0 % |  |",
        "| 5 | linear on pixels | 60.0 % | 80.0 % | 90.0 % | 2 of 3 seeds, "
        "median +20.0 |",
        "| 10 | hub layer | 100.0 % | 100.0 % | 100.0 % |  |",
    ]


def test_pool(tmp_path):
    pool = transfer.Pool(tmp_path)
    sizes = {name: split.size for name, split in pool.splits.items()}
    assert sizes == {"train": 448, "validation": 179, "test": 269}
    found = [set(split.identifiers) for split in pool.splits.values()]
    names = [{one.rpartition("/")[2] for one in part} for part in found]
    assert sum(map(len, names)) == len(set().union(*names))
    classes = pool.splits["test"].class_names
    assert classes == ("eight", "five", "nine", "seven", "six")
    draws = [
        set(pool.splits["train"].few_shot(10, seed).identifiers)
        for seed in (0, 1)
    ]
    assert len(draws[0]) == 50
    assert draws[0] != draws[1]


def test_symmetries_are_classes():
    mark = np.zeros([1, 32, 32, 3], np.float32)
    mark[:, 6:12, 8:24] = mark[:, 6:24, 8:12] = 1
    x = np.repeat(mark, 400, axis=0)
    y = np.full(400, 3)
    found, labels = transfer.symmetries(x, y, np.random.default_rng(0))
    assert found.shape == x.shape
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert 0.9 < found.max() <= 1
    assert set(labels) == {3 + 5 * turn for turn in range(8)}
    # Each class's mean is nearest to its own symmetry of the mark.
    turned = [np.rot90(mark[0], turn) for turn in range(4)]
    turned += [np.rot90(mark[0][:, ::-1], turn) for turn in range(4)]
    for turn in range(8):
        mean = found[labels == 3 + 5 * turn].mean(0)
        distances = [np.square(mean - one).sum() for one in turned]
        assert np.argmin(distances) == turn


@pytest.mark.slow
def test_transfer_through_a_hub(capsys):
    command = "--json --shots 5 --seeds 1 --steps 20 --epochs 5"
    transfer.main([*command.split(), "--learning-rates", "0.03"])
    results = {
        row["method"]: row["accuracies"][0]
        for row in json.loads(capsys.readouterr().out.splitlines()[-1])
    }
    assert results[transfer.TRANSFER] > results[transfer.SCRATCH]
    assert results[transfer.TRANSFER] > 0.6
    assert results[transfer.PIXELS] > 0.6
