"""Mixes: names, exact bytes, assignments, and their passage through table, problem, allocation and files."""

import numpy as np
import pytest

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS, parse_format
from mpq.core.layer import Layer
from mpq.core.mix import families, mix_of, parse_mix
from mpq.core.problem import build_problem
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.core.taxonomy import classify

NAME = "int2-g64/int3-g64/int4-g64@3"


@pytest.mark.parametrize(
    "name", [NAME, "int2-channel/bf16@2.75", "int3-g64/int4-g64-asym@3.625+a:int8-token", "q4_k/q6_k@5.5"]
)
def test_names_survive(name):
    assert parse_scheme(name).name == name
    assert parse_scheme(name).mix.formats == tuple(map(parse_format, name.split("@")[0].split("/")))


@pytest.mark.parametrize(
    "name", ["int4-g64@3", "int4-g64/int4-g64@4", "int4/int8@5", "nvfp4/int4-g64@4", "int2-g64/int3-g64@x", "a/b@2"]
)
def test_invalid_mixes_are_refused(name):
    with pytest.raises(MpqError):
        parse_scheme(name)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_are_the_largest_within_the_bits(seed):
    random = np.random.default_rng(seed)
    known = [format for format in map(parse_format, FORMATS) if format.granularity in ("group", "channel", "none")]
    picked = random.choice([one for one in known if not one.tensor_scale], random.integers(2, 6), replace=False)
    rows, cols = int(random.integers(1, 200)), int(random.integers(1, 400))
    mix = mix_of(tuple(picked), float(random.uniform(2, 9)))
    sizes, fixed = mix.row_bytes(cols), mix.assignment_bytes(rows)
    most = mix.bits * rows * cols / 8
    assert rows * min(sizes) <= mix.nbytes(rows, cols) - fixed <= rows * max(sizes)
    assert mix.nbytes(rows, cols) <= max(most, rows * min(sizes) + fixed)
    if mix.suits(rows, cols):
        low = max(size for size in sizes if size * rows + fixed <= most)
        step = min(size for size in sizes if size > low) - low
        assert mix.nbytes(rows, cols) + step > most


def test_an_assignment_must_take_the_bytes_of_its_mix():
    mix = parse_mix("int2-g64/int3-g64/int4-g64@3")
    rows, cols = 8, 256
    total = mix.nbytes(rows, cols) - mix.assignment_bytes(rows)
    ones = (total - rows * mix.row_bytes(cols)[0]) // 32
    places = np.array([1] * ones + [0] * (rows - ones))
    assert mix.with_assignment(places).assigned(rows, cols).tolist() == places.tolist()
    places[:3] = 2, 1, 0  # the same bytes
    assert mix.with_assignment(places).assigned(rows, cols).tolist() == places.tolist()
    for wrong in ("", "01", "2" * rows, "9" * rows, "0" * (rows + 1)):
        with pytest.raises(MpqError):
            mix.with_assignment(wrong).assigned(rows, cols)


def test_families_differ_in_their_grid_alone():
    names = "nl4-g64 int2-g64 int3-g128 int8-channel bf16 int4-channel int4-g64-asym fp8-e4m3"
    found = families([parse_format(name) for name in names.split()])
    names = [" ".join(one.name for one in family) for family in found]
    assert names == ["int2-g64 nl4-g64", "int4-channel int8-channel"]


def made():
    layers = (Layer("a", "linear", 8, 256), Layer("b", "linear", 4, 256))
    mixes = {"a": {NAME: "10101001"}, "b": {NAME: "0111"}}
    schemes = ("int2-g64", NAME, "int4-g64")
    bits = parse_mix(NAME)
    for layer in layers:  # as many rows raised as the mix has room for
        room = bits.nbytes(layer.rows, 256) - bits.assignment_bytes(layer.rows) - layer.rows * bits.row_bytes(256)[0]
        mixes[layer.name] = {NAME: ("1" * (room // 32)).rjust(layer.rows, "0")}
    return SensitivityTable(layers, schemes, [[3.0, 2, 1], [3, 1, 0.5]], np.zeros((2, 3)), "made", {}, {}, mixes)


def test_assignments_travel_from_table_to_allocation(tmp_path):
    table = made()
    table.save(tmp_path / "table.csv")
    assert SensitivityTable.load(tmp_path / "table.csv") == table
    problem = build_problem(table)
    assert [name for name, _ in problem.uniform()] == ["int2-g64", "int4-g64"]
    allocation = problem.allocation([1, 2])
    assert allocation.assignments == {"a": table.assignments["a"][NAME]}
    assert allocation.scheme_of["a"].mix.assignment == table.assignments["a"][NAME]
    assert allocation.size == parse_mix(NAME).nbytes(8, 256) + parse_format("int4-g64").nbytes(4, 256)
    allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == allocation
    assert allocation.with_schemes({"a": "int2-g64"}).assignments == {}
    mixed = allocation.with_schemes({"a": "int2-g64", "b": problem.allocation([1, 1]).scheme_of["b"]})
    assert mixed.assignments == {"b": table.assignments["b"][NAME]}
    assert classify(problem.allocation([1, 1])).weights == "mixed"


def test_an_assignment_needs_its_mix():
    table = made()
    with pytest.raises(MpqError, match="expected a layer with a mix"):
        Allocation(table.layers, ("int2-g64", "int4-g64"), assignments={"a": "0" * 8})
    with pytest.raises(MpqError, match="expected a layer and a mix"):
        SensitivityTable(table.layers, table.schemes, table.scores, table.errors, "x", {}, {}, {"a": {"int2-g64": "0"}})


def test_the_smallest_cases_by_hand():
    """Rows of 36, 52 and 68 bytes, 2 bits of assignment per row for three formats, 1 bit for two."""
    mix = parse_mix("int2-g64/int3-g64/int4-g64@2.75")
    assert mix.row_bytes(128) == [36, 52, 68]
    assert [mix.assignment_bytes(rows) for rows in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    assert parse_mix("int2-g64/int3-g64@2.75").assignment_bytes(9) == 2
    assert mix.nbytes(10, 128) == 3 + 6 * 36 + 4 * 52  # 440 bytes hold 4 rows of the larger and not 5
    assert parse_mix("int2-g64/int3-g64/int4-g64@2").nbytes(10, 128) == 3 + 10 * 36  # nothing is smaller
    assert parse_mix("int2-g64/int3-g64/int4-g64@9").nbytes(10, 128) == 3 + 10 * 68  # nothing is larger
    suited = [parse_mix(f"int2-g64/int3-g64/int4-g64@{bits}").suits(10, 128) for bits in (2, 2.75, 9)]
    assert suited == [False, True, False]
    assert mix.code_bits == pytest.approx(2.5)
    assert mix.groups(128) == 2
    assert parse_mix("int2-g32/int3-g64@2.75").groups(128) == 4


def test_how_many_formats_a_mix_takes():
    names = [f"int{bits}-g{size}" for bits in (2, 3, 4) for size in (32, 64, 128, 256)]
    formats = [parse_format(name) for name in names]
    assert len(mix_of(formats[:10], 3.0).formats) == 10
    with pytest.raises(MpqError, match="2 to 10 different formats"):
        mix_of(formats[:11], 3.0)
    with pytest.raises(MpqError, match="2 to 10 different formats"):
        mix_of(formats[:1], 3.0)
    with pytest.raises(MpqError, match="different"):
        mix_of([*formats[:2], formats[0]], 3.0)
    assert mix_of(formats[:2], 3.00049).bits == 3.0
    assert mix_of([formats[8], formats[0]], 3.0).grid == formats[8].grid  # the widest, wherever it stands
    assert [len(family) for family in families([parse_format(f"int{bits}-g64") for bits in range(2, 9)])] == [7]


def test_places_beyond_the_formats_are_refused():
    mix = parse_mix("int2-g64/int3-g64@2.75")
    with pytest.raises(MpqError, match="does not fit"):
        mix.with_assignment("02").assigned(2, 128)
    with pytest.raises(MpqError, match="does not fit"):
        mix.with_assignment("011").assigned(2, 128)
    assert mix.with_counts([1, 1]).assignment == "01"
