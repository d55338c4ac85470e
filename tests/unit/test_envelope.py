"""The envelope's form (engine.envelope): what is written is read again, and nothing else is."""

from __future__ import annotations

import pytest
from asn1crypto import core
from hypothesis import given
from hypothesis import strategies as st

from hagroup.engine.envelope import (
    Carrier,
    Content,
    Envelope,
    EnvelopeError,
    Header,
    attributes_digest,
    decode,
    decode_content,
)

numbers = st.integers(min_value=0, max_value=2**64 - 1)
headers = st.builds(
    Header,
    domain_key_id=st.binary(max_size=20),
    partition_key_id=st.binary(max_size=20),
    uid=st.binary(max_size=20),
    revision=numbers,
    object_class=numbers,
    key_type=st.none() | numbers,
)
envelopes = st.builds(
    Envelope, header=headers, nonce=st.binary(min_size=12, max_size=12), sealed=st.binary(max_size=400)
)
contents = st.builds(Content, wrapped=st.binary(max_size=300)) | st.builds(
    Content, wrapped=st.binary(max_size=40), carrier=st.sampled_from(Carrier), carried=st.binary(max_size=300)
)
attributes = st.dictionaries(numbers, st.binary(max_size=20), max_size=6)

SAMPLE = Envelope(
    header=Header(
        domain_key_id=b"d" * 16,
        partition_key_id=b"p" * 16,
        uid=b"u" * 16,
        revision=3,
        object_class=4,
        key_type=0x1F,
    ),
    nonce=b"n" * 12,
    sealed=b"s" * 60,
)


@given(envelopes)
def test_an_envelope_is_read_as_it_was_written(envelope: Envelope) -> None:
    assert decode(envelope.encode()) == envelope


@given(contents)
def test_a_content_is_read_as_it_was_written(content: Content) -> None:
    assert decode_content(content.encode()) == content


@given(st.binary(max_size=200))
def test_what_is_foreign_is_refused_with_a_sentence(data: bytes) -> None:
    with pytest.raises(EnvelopeError, match="envelope"):
        decode(data)


@given(envelopes, st.data())
def test_damage_is_refused_or_shows(envelope: Envelope, draw: st.DataObject) -> None:
    """Whatever is read is written the same way again: there is one form only, and nothing is passed over."""
    encoded = bytearray(envelope.encode())
    position = draw.draw(st.integers(min_value=0, max_value=len(encoded) - 1))
    encoded[position] ^= draw.draw(st.integers(min_value=1, max_value=255))
    try:
        read = decode(bytes(encoded))
    except EnvelopeError:
        return
    assert read != envelope
    assert read.encode() == bytes(encoded)


@given(st.binary(max_size=60))
def test_a_foreign_content_is_refused(data: bytes) -> None:
    try:
        content = decode_content(data)
    except EnvelopeError:
        return
    assert content.encode() == data


@pytest.mark.parametrize("cut", [0, 1, 10, 80, -1])
def test_a_part_is_refused(cut: int) -> None:
    with pytest.raises(EnvelopeError):
        decode(SAMPLE.encode()[:cut])


def test_more_than_an_envelope_is_refused() -> None:
    with pytest.raises(EnvelopeError):
        decode(SAMPLE.encode() + b"\0")


def test_a_later_version_is_named() -> None:
    encoded = SAMPLE.encode()
    later = encoded.replace(core.Integer(1).dump(), core.Integer(9).dump(), 1)
    with pytest.raises(EnvelopeError, match="version 9"):
        decode(later)


def test_no_key_material_comes_into_a_text() -> None:
    marked = Envelope(header=SAMPLE.header, nonce=SAMPLE.nonce, sealed=b"SECRETSECRET").encode()
    with pytest.raises(EnvelopeError) as error:
        decode(marked[:-1])
    assert "SECRET" not in str(error.value)
    assert error.value.__cause__ is None


@given(headers, headers, attributes, attributes)
def test_the_associated_data_tells_everything_apart(
    one: Header, other: Header, first: dict[int, bytes], second: dict[int, bytes]
) -> None:
    same = one.associated_data(first) == other.associated_data(second)
    assert same is ((one, first) == (other, second))


def test_the_order_of_attributes_does_not_matter() -> None:
    assert attributes_digest({1: b"a", 2: b"b"}) == attributes_digest({2: b"b", 1: b"a"})
    assert attributes_digest({1: b"a", 2: b""}) != attributes_digest({1: b"a"})
