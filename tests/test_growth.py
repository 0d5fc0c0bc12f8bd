"""How a group of rows grows with new tokens: what it holds, and what memory that takes."""

from __future__ import annotations

import pytest
import torch

from evolkv.cache.rows import RowGroup

ROWS, DIM = 2, 16
#: Entries of a group whose keys have 512 KiB.
LARGE = 4096


def group_of(entries):
    torch.manual_seed(0)
    positions = torch.arange(entries, dtype=torch.int32).expand(ROWS, -1)
    return RowGroup(torch.arange(ROWS), torch.randn(ROWS, entries, DIM), torch.randn(ROWS, entries, DIM), positions)


def bytes_of(entries):
    return ROWS * entries * DIM * 4 * 2


def grow(group, steps, new=1):
    """Appends random tokens; returns what the group must hold then."""
    keys, values = group.keys.clone(), group.values.clone()
    for _ in range(steps):
        more = torch.randn(2, ROWS, new, DIM)
        group.append(*more)
        keys, values = torch.cat([keys, more[0]], 1), torch.cat([values, more[1]], 1)
    return keys, values


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("entries", [5, LARGE])
def test_a_group_holds_its_entries_and_the_new_ones_in_order(entries, new):
    group = group_of(entries)
    keys, values = grow(group, 40, new)
    assert torch.equal(group.keys, keys)
    assert torch.equal(group.values, values)


def test_a_small_group_grows_by_exactly_the_new_tokens():
    group = group_of(100)
    for tokens in range(1, 50):
        grow(group, 1)
        assert group.nbytes == bytes_of(100 + tokens)


def test_a_large_group_reserves_room_for_sixteen_tokens_at_most_and_says_so():
    group = group_of(LARGE)
    assert group.nbytes == bytes_of(LARGE)
    moves, memory = 0, group.keys.untyped_storage().data_ptr()
    for tokens in range(1, 200):
        grow(group, 1)
        held = LARGE + tokens
        assert bytes_of(held) <= group.nbytes <= bytes_of(held + 16)
        assert group.nbytes == group.keys.untyped_storage().nbytes() + group.values.untyped_storage().nbytes()
        moves += group.keys.untyped_storage().data_ptr() != memory
        memory = group.keys.untyped_storage().data_ptr()
    assert moves <= 200 / 16


@pytest.mark.parametrize("entries", [20, LARGE])
def test_a_group_that_drops_as_many_as_it_gains_keeps_its_size(entries):
    group = group_of(entries)
    keys, values = group.keys, group.values
    for step in range(60):
        more = torch.randn(2, ROWS, 1, DIM)
        group.append(*more)
        group.positions = torch.cat([group.positions, torch.full((ROWS, 1), entries + step, dtype=torch.int32)], 1)
        group.drop_oldest(1)
        keys, values = torch.cat([keys, more[0]], 1)[:, 1:], torch.cat([values, more[1]], 1)[:, 1:]
        assert torch.equal(group.keys, keys)
        assert torch.equal(group.values, values)
        assert group.positions[0].tolist() == list(range(step + 1, entries + step + 1))
        assert group.nbytes <= bytes_of(entries + 18)


def test_a_group_can_grow_after_entries_were_taken_back():
    group = group_of(LARGE)
    keys, _ = grow(group, 5)
    group.keep_entries(slice(None, -3))
    assert group.nbytes == bytes_of(LARGE + 2)
    expected, _ = grow(group, 4)
    assert torch.equal(group.keys, expected)
    assert torch.equal(group.keys[:, : LARGE + 2], keys[:, :-3])


def test_a_group_filled_in_inference_mode_can_grow_outside_it():
    with torch.inference_mode():
        group = group_of(LARGE)
        grow(group, 1)
    expected, _ = grow(group, 2)
    assert torch.equal(group.keys, expected)


def test_gradients_reach_what_was_appended():
    group = group_of(LARGE)
    first, second = (torch.randn(ROWS, 1, DIM, requires_grad=True) for _ in range(2))
    group.append(first, first)
    total = (group.keys**2).sum()
    group.append(second, second)
    (total + (group.keys**2).sum()).backward()
    torch.testing.assert_close(first.grad, 4 * first.detach())
    torch.testing.assert_close(second.grad, 2 * second.detach())


def test_many_entries_that_leave_a_window_at_once_take_their_memory_with_them():
    group = group_of(LARGE)
    grow(group, 1, new=600)
    group.positions = torch.cat([group.positions, torch.zeros(ROWS, 600, dtype=torch.int32)], 1)
    group.drop_oldest(600)
    assert group.nbytes == bytes_of(LARGE)
