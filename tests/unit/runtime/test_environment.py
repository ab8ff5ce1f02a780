"""The environment of a role: written values are read back, an error names the variable, and the type has every variable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.errors import UserError
from grounding.runtime.environment import Environment, RlEnvironment, table

ROOT = Path(__file__).parents[3]
ELSEWHERE = ("EGM_FAILPOINTS", "EGM_FAILPOINTS_TRACE", "EGM_HEADER")
"""A variable of grounding/failpoints.py, which is for tests and imports nothing."""

text = st.text("abcdefgh/-_. ", min_size=1).map(str.strip).filter(bool)
path = text.map(Path).filter(lambda p: str(p) == str(p).strip())
variables = st.fixed_dictionaries(
    {},
    optional={
        "job": text,
        "attempt": st.integers(0, 10**6),
        "output": text,
        "pvc_root": path,
        "cache": path,
        "grace_seconds": st.floats(0, 1e6),
        "port": st.integers(0, 65535),
        "endpoints": st.lists(st.from_regex(r"https?://[a-z]{1,9}:[0-9]{1,5}", fullmatch=True), min_size=1).map(tuple),
        "engine_args": st.lists(st.text("ab '\"\\-=", min_size=1), min_size=1).map(tuple),
        "flashinfer": st.booleans(),
        "shm_min_bytes": st.integers(0, 2**50),
        "log_level": st.sampled_from(["DEBUG", "INFO", "WARNING", "ERROR"]),
        "log_format": st.sampled_from(["text", "json"]),
    },
)


@given(variables)
def test_what_is_written_is_what_is_read(values: dict[str, object]) -> None:
    wanted = Environment(**values)  # type: ignore[arg-type]
    environ = wanted.as_environ()
    assert all(name.startswith("EGM_") and isinstance(value, str) for name, value in environ.items())
    assert Environment.from_environ({"PATH": "/bin", **environ}) == wanted


@given(st.sampled_from(sorted(Environment.model_fields)), st.text(max_size=12))
def test_any_text_is_a_value_or_a_mistake_of_that_variable(field: str, value: str) -> None:
    name = Environment.variable(field)
    try:
        Environment.from_environ({name: value})
    except UserError as error:
        assert error.field == name and repr(value) in str(error)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("EGM_GRACE_SECONDS", "soon", "seconds"),
        ("EGM_GRACE_SECONDS", "-1", "seconds"),
        ("EGM_GRACE_SECONDS", "nan", "seconds"),
        ("EGM_GRACE_SECONDS", "inf", "seconds"),
        ("EGM_ATTEMPT", "-1", "a whole number"),
        ("EGM_ATTEMPT", "1_0", "a whole number"),
        ("EGM_ATTEMPT", "+1", "a whole number"),
        ("EGM_ATTEMPT", "\u0661", "a whole number"),
        ("EGM_PORT", "65536", "a port"),
        ("EGM_PROGRESS_PORT", "eight", "a port"),
        ("EGM_RAY_PORT", "-1", "a port"),
        ("EGM_LOG_LEVEL", "LOUD", "one of DEBUG"),
        ("EGM_LOG_FORMAT", "xml", "one of text, json"),
        ("EGM_FLASHINFER", "perhaps", "1 or 0"),
        ("EGM_ENGINE_ARGS", "--name 'open", "words of a command line"),
        ("EGM_SHM_MIN_BYTES", "1Gi", "a whole number"),
        ("EGM_WAIT_SECONDS", "1.5", "a whole number"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"{name}: expected {expected}.*found {re.escape(repr(value))}"):
        Environment.from_environ({name: value})


def test_an_empty_variable_is_an_absent_one() -> None:
    names = [Environment.variable(field) for field in Environment.model_fields]
    assert Environment.from_environ(dict.fromkeys(names, " ")) == Environment()


@pytest.mark.parametrize("model", [Environment, RlEnvironment])
def test_the_docs_have_the_table(model: type[Environment] | type[RlEnvironment]) -> None:
    page = (ROOT / "docs" / "images.md").read_text()
    assert table(model) in page, "the table in docs/images.md is out of date; run `make docs`"


def test_every_variable_that_the_code_names_is_in_the_type() -> None:
    known = {m.variable(field) for m in (Environment, RlEnvironment) for field in m.model_fields} | set(ELSEWHERE)
    for source in [*(ROOT / "grounding").rglob("*.py"), *(ROOT / "operator/egm_operator/manifests").rglob("*.py")]:
        for name in re.findall(r"\bEGM_[A-Z0-9_]*[A-Z0-9](?![a-z])", source.read_text()):
            assert name in known or name.startswith("EGM_OPERATOR_"), (
                f"{source.relative_to(ROOT)} names {name}, which is not in the type of the environment"
            )
