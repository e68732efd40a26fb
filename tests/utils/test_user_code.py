"""Functions by name: what is said where their module cannot be imported."""

from __future__ import annotations

import pytest

from verl.utils.user_code import load_function


def test_a_module_that_is_missing_is_told_from_one_that_it_needs(tmp_path):
    file = tmp_path / "needs.py"
    file.write_text("import no_such_package.part\n\ndef f(): ...\n")
    with pytest.raises(
        ValueError, match=r"needs the module no_such_package, .*pip install no_such"
    ):
        load_function(f"{file}:f", user="reward function")
    with pytest.raises(ValueError, match="reward function nowhere.part:f: cannot import 'nowhere.part'"):
        load_function("nowhere.part:f", user="reward function")
