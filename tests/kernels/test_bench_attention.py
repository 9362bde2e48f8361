import pytest
import torch

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.kernels import attention
from mpq.kernels.bench import latency_table
from mpq.kernels.bench_attention import attention_calls, measure_attention

HEADS = (4, 2, 32)


def test_keys_and_values_of_every_format_are_timed_and_become_a_table():
    found = list(measure_attention([HEADS], [64, 200], [1, 2], ["int4-asym", "fp16"], repeats=3, beyond=2**16))
    assert {(one.format, one.kind, one.context, one.batch) for one in found} == {
        (name, kind, context, batch)
        for name in ("int4-token-asym", "fp16")
        for kind in ("keys", "values")
        for context in (64, 200)
        for batch in (1, 2)
    }
    assert all(one.seconds >= 0 for one in found)
    assert next(one.nbytes for one in found if (one.format, one.context, one.batch) == ("fp16", 64, 2)) == 2**14
    table = latency_table([], attention=[one.latency for one in found])
    one = next(one for one in found if (one.kind, one.context, one.batch) == ("values", 200, 2))
    seconds = table.cost(2, 200)(Layer("cache.0.values", "values", 2, 32), parse_scheme(f"kv:{one.format}"))
    assert seconds == one.seconds


def test_the_timed_call_is_attention():
    nbytes, timed = attention_calls("int8-token", "fp16", HEADS, 70, 3, beyond=1)
    assert nbytes == 3 * 2 * 2 * 64 * (32 + 2 + 64)
    for call in timed.calls:
        torch.testing.assert_close(call(), attention.attend_plainly(*call.args), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "contexts", "name", "message"),
    [
        ((5, 2, 32), [64], "fp16", "5x2x32"),
        (HEADS, [0], "fp16", "context 0"),
        (HEADS, [64], "int4-g8", "no kernel reads"),
    ],
)
def test_unsupported_formats_are_refused_by_name(shape, contexts, name, message):
    with pytest.raises(MpqError, match=message):
        list(measure_attention([shape], contexts, formats=[name], repeats=1))
