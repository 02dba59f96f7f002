from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_param.errors import SliceError
from lora_param.targets.regions import Region, Target, parse_slice, parse_target, weight_name


def resolve(text: str, *shape: int) -> Region:
    return parse_slice(text, f"w[{text}]").resolve("w", shape)


@pytest.mark.parametrize(
    ("text", "shape", "written"),
    [
        ("0:64", (192, 64), "[0:64]"),
        (":64", (192, 64), "[0:64]"),
        ("64:", (192, 64), "[64:192]"),
        ("-64:", (192, 64), "[128:192]"),
        (":,8:16", (192, 64), "[:,8:16]"),
        ("0:2,1:3", (4, 4, 3, 3), "[0:2,1:3]"),
        ("0/3", (192, 64), "[0:64]"),
        ("2/3", (192, 64), "[128:192]"),
        ("*", (8, 4, 4), "[*]"),
        (":", (8, 4), ""),
        ("0:8", (8, 4), ""),
        ("0/1", (8, 4), ""),
        ("0:8,0:4", (8, 4), ""),
    ],
)
def test_slices_resolve(text: str, shape: tuple[int, ...], written: str) -> None:
    assert str(resolve(text, *shape)) == written
    assert parse_target(f"w{written}", shape) == Target("w", resolve(text, *shape))


@pytest.mark.parametrize(
    ("text", "shape", "why"),
    [
        ("0:65", (64, 4), "within 0:64"),
        ("4:4", (64, 4), "at least one"),
        ("9:3", (64, 4), "at least one"),
        (":,0:5", (64, 4), "columns within 0:4"),
        ("-65:", (64, 4), "within 0:64"),
        ("3/3", (192, 4), "0 to 2"),
        ("-1/3", (192, 4), "0 to 2"),
        ("0/0", (192, 4), "0 to 0"),
        ("0/5", (192, 4), "do not divide into 5"),
        ("*", (8, 4), "three dimensions"),
    ],
)
def test_slices_that_do_not_fit(text: str, shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(SliceError, match=why) as error:
        resolve(text, *shape)
    assert str(shape) in str(error.value)


ranges = st.tuples(st.integers(0, 9), st.integers(1, 10)).filter(lambda r: r[0] < r[1])
regions = st.builds(Region, rows=st.none() | ranges, columns=st.none() | ranges)


@given(regions, regions)
def test_overlap_is_what_numpy_sees(a: Region, b: Region) -> None:
    grid = np.zeros((10, 10), int)
    grid[a.index] += 1
    grid[b.index] += 1
    assert a.overlaps(b) == bool((grid == 2).any())


@given(regions)
def test_the_shape_of_a_region_is_numpys(region: Region) -> None:
    assert region.shape((10, 10, 3)) == np.zeros((10, 10, 3))[region.index].shape


def test_picked_rows_are_read_as_they_are_written() -> None:
    target = parse_target("emb.weight[1,4,5]", (7, 3))
    assert (str(target), weight_name(str(target))) == ("emb.weight[1,4,5]", "emb.weight")
    assert target.region.shape((7, 3)) == target.region.matrix((7, 3)) == (3, 3)
    assert np.arange(7)[target.region.index].tolist() == [1, 4, 5]
    for key in ("emb.weight[4,1]", "emb.weight[1,1]", "emb.weight[7]"):
        with pytest.raises(SliceError, match="ascending rows within 0:7"):
            parse_target(key, (7, 3))


@pytest.mark.parametrize(
    ("a", "b", "meet"),
    [
        (Region(picked=(1, 4)), Region(picked=(4,)), True),
        (Region(picked=(1, 4)), Region(picked=(2, 3)), False),
        (Region(picked=(1, 4)), Region(rows=(2, 4)), False),
        (Region(picked=(1, 4)), Region(rows=(2, 5)), True),
        (Region(picked=(1,)), Region(columns=(0, 2)), True),
    ],
)
def test_picked_rows_overlap_what_holds_one_of_them(a: Region, b: Region, meet: bool) -> None:
    assert a.overlaps(b) is b.overlaps(a) is meet
