"""Tests that the tables of model families in the documentation are true."""

from __future__ import annotations

import pytest

from tests.engines.hf.families import MODELS, documented, reason_of, status_of


@pytest.mark.parametrize("family", MODELS)
def test_what_works_with_a_family_is_as_documented(family):
    status = status_of(family)
    assert documented()[family] == ((reason_of(status),) if isinstance(status, str) else status.row)


def test_the_documented_families_are_all_tried():
    assert documented().keys() == MODELS.keys()
