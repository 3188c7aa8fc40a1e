import contextlib
import os
import sqlite3
import stat

import pytest

from bit_tf import embed_plan, errors
from bit_tf.embed_plan import Place, Plan
from bit_tf.items import Item


def named(*names):
    return [Item(name, name, ("file", name)) for name in names]


@pytest.fixture
def plan(tmp_path):
    with Plan(tmp_path / embed_plan.FILE_NAME) as opened:
        yield opened


def ids(plan):
    return [[item.id for item in plan.items(s)] for s in plan.shards()]


def test_shards_stay_as_they_were_divided(plan):
    assert plan.add(named(*"abcde"), 2) == 5
    assert ids(plan) == [["a", "b"], ["c", "d"], ["e"]]
    # What is new makes shards of its own, of another size.
    assert plan.add(named(*"zaybxc"), 3) == 3
    assert ids(plan) == [["a", "b"], ["c", "d"], ["e"], ["z", "y", "x"]]
    assert plan.add(named(*"abc"), 3) == 0
    assert plan.counts() == (8, 0)


def test_items_come_back_as_they_were(plan):
    found = [
        Item("a.png", "a.png", ("file", "a.png")),
        Item("https://h/x.png", "https://h/x.png", ("url", "https://h/x.png")),
        Item("b\\udcff.png", "b\\udcff.png", ("file", "b\udcff.png")),
        Item("s.tar#m", "the member", ("tar", "s.tar", 512, 100)),
        Item("tfds:d/test/3", "d", ("tfds", "d", None, "test", 3, None)),
    ]
    plan.add(found, 10)
    (shard,) = plan.shards()
    assert plan.items(shard) == found


def test_a_place_that_changed_is_taken(plan):
    plan.add([Item("s.tar#m", "m", ("tar", "s.tar", 512, 100))], 10)
    moved = Item("s.tar#m", "m", ("tar", "s.tar", 1024, 99))
    assert plan.add([moved], 10) == 0
    (shard,) = plan.shards()
    assert plan.items(shard) == [moved]


def test_two_files_of_one_id_are_refused(plan):
    plan.add([Item("a", "a", ("file", "/x/a"))], 10)
    for place in [("file", "/y/a"), ("tar", "/x/a.tar", 0, 1)]:
        with pytest.raises(errors.DatasetError, match="/x/a") as raised:
            plan.add([Item("b", "b", ("file", "/b")), Item("a", "", place)], 9)
        assert place[1] in str(raised.value)
    assert ids(plan) == [["a"]]
    found = [Item("c", "c", ("file", f"/{name}")) for name in "xy"]
    with pytest.raises(errors.DatasetError, match="same directory"):
        plan.add(found, 10)


def test_what_follows_from_an_id_is_not_kept(plan, tmp_path, monkeypatch):
    here = os.getcwd()
    found = [
        Item("a/b.png", "a/b.png", ("file", f"{here}/a/b.png")),
        Item("/c.png", "/c.png", ("file", "/c.png")),
    ]
    plan.add(found, 10)
    monkeypatch.chdir(tmp_path)
    with Plan(tmp_path / embed_plan.FILE_NAME) as again:
        (shard,) = again.shards()
        assert again.items(shard) == found
    with contextlib.closing(
        sqlite3.connect(tmp_path / embed_plan.FILE_NAME)
    ) as database:
        kept = database.execute("SELECT source, location FROM items")
        assert set(kept) == {(None, None)}


def test_others_do_not_read_it(plan, tmp_path):
    """It may hold URLs with a password."""
    mode = os.stat(tmp_path / embed_plan.FILE_NAME).st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_an_interrupted_listing_leaves_nothing(plan):
    plan.add(named("a"), 2)

    def cut():
        yield from named("b", "c", "d")
        raise errors.DatasetError("The list ends.")

    with pytest.raises(errors.DatasetError, match="The list ends"):
        plan.add(cut(), 2)
    assert ids(plan) == [["a"]]
    assert plan.add(named("c", "b"), 2) == 2
    assert ids(plan) == [["a"], ["c", "b"]]


def test_bytes_are_found_in_earlier_shards_only(plan):
    plan.add(named(*"abcdef"), 2)
    shards = list(plan.shards())
    one, two = "01" * 32, "02" * 32
    plan.finish(shards[1], size=9, errors=1, encoded=[(one, 0)])
    assert plan.seen(one, 2) == Place(1, 0)
    assert plan.seen(one, 1) is None
    assert plan.seen(two, 2) is None
    plan.finish(shards[2], size=9, errors=0, encoded=[(one, 1), (two, 0)])
    assert plan.seen(one, 3) == Place(1, 0)
    plan.finish(shards[0], size=9, errors=0, encoded=[(one, 1)])
    assert plan.seen(one, 1) == Place(0, 1)
    assert plan.counts() == (6, 6)
    assert plan.erroneous() == 1
    plan.reopen(shards[0])
    assert plan.seen(one, 1) is None
    assert plan.counts() == (6, 4)
    assert [shard.done for shard in plan.shards()] == [False, True, True]


def test_it_is_kept(tmp_path):
    path = tmp_path / embed_plan.FILE_NAME
    with Plan(path) as plan:
        plan.add(named("a", "b"), 1)
        plan.put("facts", "é")
        plan.put("facts", "ü")
    with Plan(path) as plan:
        assert plan.get("facts") == "ü"
        assert plan.get("none") is None
        assert ids(plan) == [["a"], ["b"]]


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / embed_plan.FILE_NAME
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(errors.DatasetError, match="--overwrite"):
        Plan(path)
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(errors.DatasetError, match="version 7"):
        Plan(path)
    with pytest.raises(errors.DatasetError, match="none"):
        Plan(tmp_path / "none" / "plan")


def test_many_shards_are_listed_in_order(plan):
    plan.add(named(*map(str, range(2500))), 1)
    assert [shard.number for shard in plan.shards()] == list(range(2500))
