"""The table of readers agrees with the functions, which settings cannot load."""

from __future__ import annotations

import inspect

from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.correction import CORRECTIONS
from verl.algorithms.losses import POLICY_LOSSES
from verl.config.checks.column_readers import COLUMN_READERS


def test_the_readers_of_a_column_are_those_whose_signature_names_it():
    functions = {**ADVANTAGES, **POLICY_LOSSES, **CORRECTIONS}
    for column, readers in COLUMN_READERS.items():
        assert {
            name for name, function in functions.items() if column in inspect.signature(function).parameters
        } == set(readers)
