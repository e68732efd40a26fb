"""Replies on disk, shared by several users of one file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from verl.rewards.judge.reply_cache import ReplyCache, key_of


def test_users_of_one_file_see_each_others_replies_and_the_first_one_stays(tmp_path):
    caches = [ReplyCache(tmp_path / "new" / "replies.db") for _ in range(4)]

    def write(number):
        for i in range(20):
            caches[number].put(f"{i}", {"reply": i})
            caches[number].put("same", {"reply": "later" if i else "first"})

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(4)))
    assert all(cache.get(f"{i}") == {"reply": i} for cache in caches for i in range(20))
    assert caches[0].get("same") == {"reply": "first"} and caches[0].get("none") is None
    for cache in caches:
        cache.close()


def test_keys_depend_on_values_and_not_on_their_order():
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1}) != key_of({"a": 1, "b": [2, 1]})
