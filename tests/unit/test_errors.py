"""Foreign texts on a terminal: characters that move the cursor are removed, and everything else is kept."""

from hypothesis import given
from hypothesis import strategies as st

from grounding.cli import run
from grounding.errors import printable


def test_what_steers_a_terminal_is_shown_as_one_character():
    hostile = "\x1b]0;TITLE\x07\x1b[2J\x1b[31mfake\x1b[0m\x1b]8;;http://x/\x07click\x1b]8;;\x07\r\x08"
    assert printable(hostile).replace("\ufffd", "") == "fakeclick"
    assert printable("a\tb\nc: ü 漢 \U0001f600") == "a\tb\nc: ü 漢 \U0001f600"


@given(st.text())
def test_no_control_character_is_left(text):
    shown = printable(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


def test_an_error_that_quotes_a_file_is_printable(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text('apiVersion: grounding.egm.dev/v1alpha1\nkind: "\\e[2Jhidden"\n')
    assert run(["validate", "-f", str(bad)]) == 2
    assert "\x1b" not in capsys.readouterr().err
