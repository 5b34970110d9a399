"""What the digest of a ledger line notices."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.data.ledger import combine, digest_text, sequence_digest

SEQUENCES = st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=6), min_size=1, max_size=6)


def digest(sequences: list[list[int]]) -> str:
    return digest_text(combine(sequence_digest(struct.pack(f"<{len(tokens)}i", *tokens)) for tokens in sequences))


@given(SEQUENCES, st.randoms(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_order_and_dealing_do_not_matter(sequences, random, ranks):
    shuffled = random.sample(sequences, len(sequences))
    assert digest(shuffled) == digest(sequences)
    parts = [combine(sequence_digest(struct.pack(f"<{len(t)}i", *t)) for t in shuffled[rank::ranks]) for rank in range(ranks)]
    assert digest_text(combine(parts)) == digest(sequences)


@given(SEQUENCES, st.data())
@settings(max_examples=100, deadline=None)
def test_any_change_shows(sequences, data):
    index = data.draw(st.integers(0, len(sequences) - 1))
    tokens, others = sequences[index], sequences[:index] + sequences[index + 1 :]
    assert digest(others) != digest(sequences)
    assert digest([*sequences, tokens]) != digest(sequences)
    changed = data.draw(st.permutations(tokens) | st.lists(st.integers(0, 300), min_size=1, max_size=6))
    assume(changed != tokens)
    assert digest([*others, changed]) != digest(sequences)


def test_a_dropped_sequence_is_not_made_up_for_by_a_doubled_one():
    a, b, c = [1, 2], [3, 4], [5, 6]
    assert len({digest(found) for found in ([a, b, c], [a, a, c], [a, c], [a, b, b, c])}) == 4


def test_digest_is_the_sum_of_blake2b_modulo_2_to_the_128():
    rows = [struct.pack("<2i", n, n + 1) for n in range(5)]
    total = sum(int.from_bytes(hashlib.blake2b(row, digest_size=16).digest(), "little") for row in rows)
    assert total > 1 << 128
    assert digest_text(combine(map(sequence_digest, rows))) == f"{total % (1 << 128):032x}"
    assert digest_text(0) == "0" * 32
