"""How large a Ray the job starts by itself."""

from muser_dist.train.cluster import needed
from tests.small import small_config


def asking(workers, slots: int, resource: str = ""):
    return small_config(train={"workers": workers, "resource": resource}, data={"decode_slots": slots})


def test_the_largest_of_the_stages_has_room():
    assert needed([asking(1, 6), asking(4, 2, "trainer"), asking(2, 2, "other")]) == (7.0, {"trainer": 4, "other": 2})
    assert needed([asking(2, 1)]) == (3.0, {})
    assert needed([asking("1:4", 1, "trainer"), asking(2, 9, "trainer")]) == (11.0, {"trainer": 4})
