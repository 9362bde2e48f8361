from hypothesis import given
from hypothesis import strategies as st

from mpq.models import tokenizer
from mpq.models.tokenizer import PieceTokenizer


@given(st.text())
def test_decoding_inverts_encoding(text):
    pieces = PieceTokenizer(["th", "the", " sea", "é", "ab", "abc"])
    assert pieces.decode(pieces.encode(text)) == text


@given(st.text("abc", max_size=12))
def test_no_longer_piece_fits_than_the_one_taken(text):
    pieces = PieceTokenizer(["ab", "abc", "ca", "ccc"])
    position = 0
    for token in pieces.encode(text):
        taken = pieces.pieces[token].decode()
        assert text.startswith(taken, position)
        longer = [p for p in ("ab", "abc", "ca", "ccc") if len(p) > len(taken)]
        assert not any(text.startswith(p, position) for p in longer)
        position += len(taken)


def test_broken_bytes_decode():
    assert PieceTokenizer([]).decode([0xFF, 0x41]) == "\ufffdA"


def test_the_bundled_one_has_distinct_pieces():
    pieces = tokenizer()
    assert len(set(pieces.pieces)) == len(pieces) == 1024
    text = "It is a truth universally acknowledged — “naïve”?\n"
    assert pieces.decode(pieces.encode(text)) == text
    assert len(pieces.encode("there was nothing more to be said")) < 12
