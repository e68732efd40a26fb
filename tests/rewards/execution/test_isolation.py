"""Functions that may leave the trainer, and functions whose state keeps them there."""

from __future__ import annotations

import threading

import pytest

from verl.rewards.execution.isolation import isolated


def where(function):
    callee = isolated(function, is_async=False)
    return callee.place, callee.note


LIMITS, EMPTY, seen, count, lock = {"a": [1, 2]}, [], [], 0, threading.Lock()


def uses_a_constant(prompt, response):
    return LIMITS[response][0]


def uses_a_list(prompt, response):
    seen.append(response)


def uses_an_empty_list(prompt, response):
    return any(EMPTY.append(r) for r in response)


def sets_a_global(prompt, response):
    global count
    count += 1


def uses_a_helper(prompt, response):
    return uses_a_list(prompt, response)


def has_an_attribute(prompt, response):
    has_an_attribute.calls += 1


has_an_attribute.calls = 0


def has_a_list_as_default(prompt, response, known=[]):  # noqa: B006
    known.append(response)


def test_a_function_that_shares_nothing_with_the_program_goes_to_a_process():
    factor = 2
    assert where(lambda prompt, response: factor * len(response)) == ("process", "")
    assert where(uses_a_constant) == ("process", "")


@pytest.mark.parametrize(
    ("function", "shared"),
    [
        (uses_a_list, "seen (list)"),
        (uses_an_empty_list, "EMPTY (list)"),
        (sets_a_global, "count, which it sets"),
        (uses_a_helper, "seen (list)"),
        (has_an_attribute, "its attribute calls"),
        (has_a_list_as_default, "default 0 (list)"),
        (lambda prompt, response: lock.locked(), "lock (lock)"),
        (LIMITS.get, "an object of type builtin_function_or_method"),
    ],
)
def test_a_function_whose_state_the_program_shares_stays_on_a_thread_and_says_why(function, shared):
    place, note = where(function)
    assert place == "thread" and note.startswith(
        f"it runs on a thread of the trainer, since it shares {shared} with"
    )
