"""Terms and profiles: hand-worked numbers, and properties of every term that is allowed."""

import json
import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.steering import (
    NEUTRAL,
    SteeringError,
    SteeringProfile,
    SteeringTerm,
    Terms,
    at_strength,
    check,
    check_name,
    digest,
    profiles_from_json,
    profiles_to_json,
    terms_from_json,
    to_arrays,
)

numbers = st.floats(-1000, 1000, width=32)
terms_of_site = st.lists(st.builds(SteeringTerm, st.integers(0, 99), numbers, numbers), max_size=4).map(tuple)
terms = st.dictionaries(st.integers(0, 2), terms_of_site, max_size=3)


@pytest.mark.parametrize(
    "name",
    [
        "caf\xe9",
        "\u05e9\u05dc\u05d5\u05dd",
        "\U0001f469\u200d\U0001f52c",
        "a/b",
        "-rf",
        'a, "b"',
        "none",
        " x ",
        "x" * 200,
    ],
)
def test_names_are_kept_in_one_form(name: str) -> None:
    for form in ("NFC", "NFD"):
        assert check_name(unicodedata.normalize(form, name)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "allowed: a string of 1 to 200 characters"),
        ("x" * 201, "allowed: a string of 1 to 200 characters"),
        ("a\tb", r"name is 'a\tb'; allowed: no control characters"),
        ("a\u2028b", r"name is 'a\u2028b'; allowed: no control characters, no line separators"),
        ("\udcff", r"name is '\udcff'; allowed: no control characters, no line separators, no halves of surrogate"),
        (" \xa0", "allowed: at least one character that is no space"),
    ],
)
def test_names_that_a_line_of_text_cannot_carry_are_refused(name: str, message: str) -> None:
    with pytest.raises(SteeringError) as caught:
        check_name(name)
    assert message in str(caught.value)


def test_strength_by_hand() -> None:
    half = at_strength({1: (SteeringTerm(3, scale=3.0, shift=-2.0),)}, 0.5)
    assert half == {1: (SteeringTerm(3, scale=2.0, shift=-1.0),)}


@given(terms)
def test_strength_0_is_neutral_and_strength_1_is_as_given(given_terms: Terms) -> None:
    assert digest(at_strength(given_terms, 0.0)) == digest(NEUTRAL)
    assert at_strength(given_terms, 1.0) == given_terms


@given(st.lists(terms, min_size=1, max_size=4))
def test_arrays_hold_every_term_and_are_neutral_elsewhere(rows: list[Terms]) -> None:
    arrays = to_arrays(rows, 3)
    assert arrays.latent.shape == arrays.scale.shape == arrays.shift.shape
    assert arrays.latent.shape[2] >= 1
    for index, row in enumerate(rows):
        for site in range(3):
            given_terms = row.get(site, ())
            width = len(given_terms)
            assert arrays.latent[index, site, :width].tolist() == [t.latent for t in given_terms]
            assert arrays.scale[index, site, :width].tolist() == [np.float32(t.scale) for t in given_terms]
            assert arrays.shift[index, site, :width].tolist() == [np.float32(t.shift) for t in given_terms]
            assert (arrays.latent[index, site, width:] == 0).all()
            assert (arrays.scale[index, site, width:] == 1).all()
            assert (arrays.shift[index, site, width:] == 0).all()


@given(terms)
def test_digest_depends_on_what_the_terms_do_not_on_how_they_are_written(given_terms: Terms) -> None:
    shuffled = {site: tuple(reversed(of_site)) for site, of_site in reversed(given_terms.items())}
    padded = {site: (*of_site, SteeringTerm(7)) for site, of_site in shuffled.items()}
    assert digest(padded) == digest(given_terms)
    assert digest({**given_terms, 9: (SteeringTerm(1, 2.0),)}) != digest(given_terms)


@given(st.lists(terms, max_size=3))
def test_profiles_survive_json(of_profiles: list[Terms]) -> None:
    profiles = tuple(
        SteeringProfile(f"p{i}", ("a", "b"), "learned", t, {"split": "test"}) for i, t in enumerate(of_profiles)
    )
    assert profiles_from_json(json.loads(json.dumps(profiles_to_json(profiles)))) == profiles


def one_term(**changes: object) -> Terms:
    return terms_from_json({"0": [{"latent": 1, "scale": 2.0, "shift": 0, **changes}]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SteeringTerm(-1), "latent is -1; allowed: 0 or more"),
        (lambda: SteeringTerm(0, scale=math.nan), "scale is nan; allowed: a finite number"),
        (lambda: SteeringTerm(0, shift=math.inf), "shift is inf; allowed: a finite number"),
        (lambda: at_strength(NEUTRAL, math.nan), "strength is nan; allowed: a finite number"),
        (lambda: check({0: (SteeringTerm(8),)}, [8]), "latent is 8 at site 0; allowed: 0 to 7"),
        (lambda: check({1: (SteeringTerm(0),)}, [8]), "site is 1; allowed: 0 to 0"),
        (lambda: check({0: (SteeringTerm(1), SteeringTerm(1))}, [8]), "latent 1 at site 0 is given twice"),
        (lambda: profiles_from_json({"schema_version": 3}), "schema_version is 3; allowed: 1 or 2"),
        (
            lambda: profiles_from_json({"schema_version": 1, "profiles": [{"name": "x"}]}),
            "profiles[0].classes is missing",
        ),
    ],
)
def test_what_is_not_allowed_is_named(make: object, message: str) -> None:
    with pytest.raises(SteeringError) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value)
