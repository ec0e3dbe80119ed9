"""Healthy lives, each family once and some steps: `make healthy` runs more (docs/healthy.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from healthy import families, ways
from healthy import ranks as rank_processes
from healthy.lives import (
    DTYPES,
    FAMILIES,
    STEPS_IN_TESTS,
    WORLDS,
    Life,
    Seen,
    all_lives,
    covering,
    each_family_once,
    problems,
    why_unfit,
)

LIVES = each_family_once(all_lives(STEPS_IN_TESTS))


@pytest.fixture(scope="module")
def ranks():
    groups = {world: rank_processes.start(world) for world in (1, 2)}
    yield groups
    for group in groups.values():
        group.stop()


def test_the_lists_agree():
    assert tuple(families.FAMILIES) == FAMILIES
    assert {way: world for way, (world, _) in ways.WAYS.items()} == WORLDS


def test_every_family_trains_in_every_precision_and_every_way_that_fits():
    lives = covering(all_lives())
    assert {(life.family, life.dtype) for life in lives} == {(life.family, life.dtype) for life in all_lives()}
    for family in FAMILIES:
        fits = {way for way in WORLDS for dtype in DTYPES if not why_unfit(family, way, dtype)}
        assert {life.way for life in lives if life.family == family} == fits


def test_the_part_has_every_family_and_every_way():
    assert [life.family for life in LIVES] == list(FAMILIES)
    assert {life.way for life in LIVES} == set(WORLDS)
    assert {life.dtype for life in LIVES} == set(DTYPES)


CLEAN = Seen("", "", [], {"report scale_too_high": 8}, 40, 8, [1.0, 1.0])


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        (CLEAN, None),
        (replace(CLEAN, error="NumericsError"), "ended early: NumericsError"),
        (replace(CLEAN, different=["head.weight"]), "not the bits of the twin: head.weight"),
        (replace(CLEAN, steps=3), "3 of 40 steps were guarded"),
        (replace(CLEAN, skipped=0), "the scale did not begin too high"),
        (replace(CLEAN, said={"report undetermined": 2}), "said 2 times: report undetermined"),
        (replace(CLEAN, twin_error="ValueError"), "does not train without a guard either: ValueError"),
    ],
)
def test_what_is_not_as_it_must_be_is_told(seen, problem):
    life = Life("vision", "fp16", "plain", 40)
    assert problems(life, [CLEAN, seen]) == ([] if problem is None else [f"rank 1: {problem}"])


def test_a_scale_too_high_is_a_false_alarm_without_a_scaler():
    life = Life("vision", "fp32", "plain", 40)
    assert problems(life, [CLEAN]) == ["rank 0: said 8 times: report scale_too_high"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("life", LIVES, ids=str)
def test_a_healthy_run_is_left_alone(ranks, life):
    assert problems(life, ranks[life.world].run(life)) == []
