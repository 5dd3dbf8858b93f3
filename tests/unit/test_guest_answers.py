"""What a guest agent may say of a command: the truth, nonsense, or an attack."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colmeia.control.guest import ExecResult, _read, _result, _Status
from colmeia.model.errors import Conflict

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["exited", "exitcode", "out-data"]), inner),
)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ({"exited": True, "exitcode": 7}, ExecResult(exit_code=7, stdout="", stderr="")),
        ({"exited": True, "signal": 9}, ExecResult(exit_code=137, stdout="", stderr="")),
        ({"exited": True, "exitcode": 0, "out-data": "aGk="}, ExecResult(exit_code=0, stdout="hi", stderr="")),
        ({"exited": True, "exitcode": 0, "out-data": "ä!"}, ExecResult(exit_code=0, stdout="", stderr="")),
    ],
)
def test_an_answer_becomes_a_result(answer: Any, result: ExecResult) -> None:
    assert _result(_read(_Status, answer)) == result


@given(ANYTHING)
def test_whatever_it_says_is_read_or_refused(answer: Any) -> None:
    try:
        _result(_read(_Status, answer))
    except Conflict as error:
        assert error.code == "agent_garbage"
