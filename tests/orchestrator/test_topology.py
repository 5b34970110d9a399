"""Which nodes a run takes, by their labels: Ray's own forms."""

from __future__ import annotations

import pytest
from ray._private import label_utils

from orchestrator.topology import is_label, is_selector, selects


@pytest.mark.parametrize("selectors, labels, taken", [
    ({}, {}, True), ({}, {"pool": "a"}, True),
    ({"pool": "a"}, {"pool": "a"}, True), ({"pool": "a"}, {"pool": "ab"}, False), ({"pool": "a"}, {}, False),
    ({"pool": "!a"}, {"pool": "b"}, True), ({"pool": "!a"}, {"pool": "a"}, False), ({"pool": "!a"}, {}, True),
    ({"pool": "in(a, b)"}, {"pool": "b"}, True), ({"pool": "in(a,b)"}, {"pool": "b"}, True), ({"pool": "in(a, b)"}, {}, False),
    ({"pool": "!in(a, b)"}, {"pool": "c"}, True), ({"pool": "!in(a, b)"}, {"pool": "a"}, False), ({"pool": "!in(a)"}, {}, True),
    ({"pool": "a", "ray.io/zone": "x"}, {"pool": "a", "ray.io/zone": "x"}, True),
    ({"pool": "a", "ray.io/zone": "x"}, {"pool": "a", "ray.io/zone": "y"}, False),
])
def test_every_selector_must_hold(selectors, labels, taken):
    assert selects(selectors, labels) is taken


@pytest.mark.parametrize("text, valid", [
    ("a", True), ("H100-80GB", True), ("!a.b_c", True), ("in(a)", True), ("!in(a, b)", True), ("a" * 63, True),
    ("", False), ("a b", False), ("in()", False), ("in(a", False), ("in(a,,b)", False), ("!!a", False), ("a,b", False),
    ("-a", False), ("a.", False), ("a" * 64, False)])
def test_what_a_selector_is(text, valid):
    """As Ray has it, but for no text at all."""
    assert is_selector(text) is valid
    assert text == "" or (label_utils.validate_label_selector_value(text) is None) is valid


@pytest.mark.parametrize("text, valid", [("pool", True), ("ray.io/accelerator-type", True), ("a b", False), ("", False),
                                         ("a/b/c", False), ("a/", False)])
def test_what_a_label_is(text, valid):
    assert is_label(text) is valid
    assert (label_utils.validate_label_key(text) is None) is valid
