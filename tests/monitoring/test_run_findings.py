"""Trouble of a run: said when it is new or grows, and summed up at the end."""

from __future__ import annotations

from verl.monitoring.run_findings import RunFindings

GOOD = {"reward": 0.5, "grad_norm": 1.0, "dead_groups_share": 0.5}
DEAD = {"reward": 0.0, "grad_norm": 0.0, "dead_groups_share": 1.0, "accuracy": 0.0}


def failing(count, total=100):
    return GOOD | {"failed_share": count / total, "outcome/reward_error": float(count)}


def test_a_good_run_has_no_findings():
    findings = RunFindings(compares_groups=True, max_tokens=8)
    assert [findings.notes(step, GOOD | {"reward": step / 9}) for step in (1, 2, 3)] == [[]] * 3
    assert findings.summary() == []


def test_answers_without_a_reward_are_said_at_first_and_when_they_become_many_more():
    findings = RunFindings()
    said = [len(findings.notes(step, failing(n), ["x is\n1"])) for step, n in enumerate((10, 20, 40, 30, 70))]
    assert said == [1, 0, 1, 0, 1]
    (line,) = RunFindings().notes(4, failing(10), ["x is\n1"])
    assert line == (
        "step 4: 10 of 100 answers have no reward and are left out (reward_error 10); the first: x is 1"
    )
    assert "170 answers had no reward, in 5 of 5 steps" in findings.summary()


def test_dead_steps_get_the_advice_that_fits_and_a_summary():
    findings = RunFindings(compares_groups=True, max_tokens=8)
    (line,) = findings.notes(1, DEAD)
    assert "no group has different rewards (mean reward 0)" in line and "no answer is right" in line
    assert findings.notes(2, DEAD | {"accuracy": 1.0}) == []
    assert "take harder prompts" in RunFindings(compares_groups=True).notes(1, DEAD | {"accuracy": 1.0})[0]
    dead, nothing = findings.summary()
    assert dead.startswith("2 of 2 steps had no group with different rewards")
    assert nothing == "the run learned nothing: in none of its 2 steps had the policy a gradient"


def test_equal_rewards_are_no_finding_where_a_critic_judges():
    assert RunFindings().notes(1, DEAD | {"grad_norm": 1.0}) == []


def test_cut_answers_and_skipped_updates_are_said():
    findings = RunFindings(max_tokens=8)
    cut, skipped = findings.notes(1, GOOD | {"truncated_share": 1.0, "skipped_updates": 2.0})
    assert "every answer was cut off at sampling.max_tokens 8; raise it" in cut
    assert skipped.startswith("step 1: 2 updates were skipped")


def test_a_reward_that_never_changes_is_said():
    findings = RunFindings()
    for step in (1, 2):
        findings.notes(step, GOOD)
    assert findings.summary() == ["the reward was 0.5 in every step"]
