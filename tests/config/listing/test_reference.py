"""The documentation of every setting."""

from __future__ import annotations

import pytest

from verl.config import ConfigError, load_config
from verl.config.listing.reference import describe_settings, find_settings, settings_markdown


def test_every_setting_is_described_with_value_default_and_source():
    docs = {doc.key: doc for doc in describe_settings(load_config("dapo"))}
    # The other two forms of a KL coefficient have six keys of their own.
    assert 90 < len(docs) <= 220 + 6 and all(doc.meaning for doc in docs.values())
    lr = docs["critic.optimizer.lr"]
    assert (lr.default, lr.type, lr.bounds, lr.source) == (1e-5, "a number", "> 0", "verl")
    assert docs["policy.optimizer.lr"].source == "GRPO, 2402.03300, 4.2"
    assert (
        docs["sampling.max_tokens"].value,
        docs["sampling.max_tokens"].default,
        docs["sampling.max_tokens"].unit,
    ) == (
        2560,
        128,
        "tokens",
    )
    assert (docs["algorithm.kl.coef.end"].value, docs["algorithm.kl.coef.end"].default) == (None, 0.1)


def test_a_prefix_selects_one_setting_or_a_section():
    assert [doc.key for doc in describe_settings(prefix="algorithm.kl.where")] == ["algorithm.kl.where"]
    assert {doc.key.split(".")[0] for doc in describe_settings(prefix="sampling")} == {"sampling"}
    with pytest.raises(ConfigError, match=r"unknown setting optimizer; the nearest is policy\.optimizer"):
        describe_settings(prefix="optimizer")


@pytest.mark.parametrize(
    ("word", "found"),
    {
        "sampling.top_p": "sampling.top_p",
        "Learning Rate": "policy.optimizer.lr",
        "save_freq": "checkpoint.every_steps",
        "rows_per_step": "rows_per_step",
    }.items(),
)
def test_a_setting_is_found_by_key_by_word_and_by_the_name_of_another_trainer(word, found):
    assert find_settings(word)[0].key == found


def test_a_word_that_no_setting_has_is_refused():
    with pytest.raises(ConfigError, match="no setting has 'abracadabra' in its key or meaning"):
        find_settings("abracadabra")


def test_the_reference_page_has_a_row_per_setting():
    page = settings_markdown()
    assert "\n| `rows_per_step` | `64` |" in page
    assert all(page.count(f"\n| `{doc.key}` |") == 1 for doc in describe_settings())
    assert "\n## `policy.optimizer`\n" in page
