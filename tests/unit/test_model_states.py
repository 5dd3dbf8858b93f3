"""The state tables: every state is in them, none is a trap, and what may be asked fits what may happen."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colmeia.model.errors import ERRORS, ColmeiaError, Conflict
from colmeia.model.operation import OPERATION_TRANSITIONS, OperationState
from colmeia.model.vm import ALLOWED_FROM, VM_TRANSITIONS, Action, VmState, check_action

TABLES: list[tuple[type[StrEnum], Mapping[Any, frozenset[Any]], Any]] = [
    (VmState, VM_TRANSITIONS, VmState.CREATING),
    (OperationState, OPERATION_TRANSITIONS, OperationState.QUEUED),
]
LEADS_THROUGH = {
    Action.START: {VmState.STARTING},
    Action.STOP: {VmState.STOPPING},
    Action.PAUSE: {VmState.PAUSED},
    Action.RESUME: {VmState.RUNNING},
    Action.DELETE: {VmState.DELETING},
}


def reachable(table: Mapping[Any, frozenset[Any]], start: Any) -> set[Any]:
    seen, ahead = {start}, [start]
    while ahead:
        for state in table[ahead.pop()] - seen:
            seen.add(state)
            ahead.append(state)
    return seen


@pytest.mark.parametrize(("states", "table", "first"), TABLES)
def test_every_state_is_in_its_table_and_can_be_reached(
    states: type[StrEnum], table: Mapping[Any, frozenset[Any]], first: Any
) -> None:
    assert set(table) == set(states)
    assert reachable(table, first) == set(states)
    assert all(state not in following for state, following in table.items())


def test_a_vm_in_any_state_can_still_be_deleted() -> None:
    assert all(VmState.DELETING in reachable(VM_TRANSITIONS, state) for state in VmState)
    assert not VM_TRANSITIONS[VmState.DELETING]


def test_an_operation_ends_exactly_where_its_table_ends() -> None:
    assert {state for state, following in OPERATION_TRANSITIONS.items() if not following} == {
        state for state in OperationState if state.is_final
    }


@given(st.sampled_from(Action), st.sampled_from(VmState))
def test_an_action_is_allowed_or_refused_with_what_to_do_instead(action: Action, state: VmState) -> None:
    if state in ALLOWED_FROM[action]:
        check_action("web1", state, action)
        return
    with pytest.raises(Conflict) as refused:
        check_action("web1", state, action)
    assert refused.value.code == "vm_state"
    assert f"Cannot {action.value} VM web1: it is {state.value}." == refused.value.message
    possible = [other for other, states in ALLOWED_FROM.items() if state in states]
    assert all(other.value in refused.value.hint for other in possible)
    assert refused.value.hint


@pytest.mark.parametrize("action", LEADS_THROUGH)
def test_what_is_allowed_is_also_a_transition(action: Action) -> None:
    for state in ALLOWED_FROM[action]:
        assert LEADS_THROUGH[action] <= VM_TRANSITIONS[state] | {state}, state


def test_every_error_has_a_kind_of_its_own_and_an_http_status() -> None:
    def leaves(error: type[ColmeiaError]) -> set[type[ColmeiaError]]:
        below = error.__subclasses__()
        return {error} if not below else set().union(*(leaves(one) for one in below))

    assert set(ERRORS.values()) == leaves(ColmeiaError)
    assert all(400 <= error.status < 600 for error in ERRORS.values())
    assert all(ERRORS[error.kind] is error for error in ERRORS.values())
