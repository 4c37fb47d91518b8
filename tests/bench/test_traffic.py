import pytest
import torch
from torch import nn

from bench.step_costs import count_flops
from bench.traffic import Traffic, TrafficCounter, add_traffic, count_traffic

SIZE = 63
ARRAY = 4 * SIZE


def arrays(count):
    return [torch.randn(SIZE) for _ in range(count)]


def test_an_operator_reads_its_inputs_and_writes_its_result():
    a, b = arrays(2)
    assert count_traffic(lambda: a + b) == (0, Traffic(ops=3 * ARRAY, least=3 * ARRAY))


def test_what_is_made_and_used_up_on_the_way_is_no_part_of_the_least():
    a, b, c = arrays(3)
    # Two operators, and a, b, c and the result.
    assert count_traffic(lambda: (a + b) * c)[1] == Traffic(6 * ARRAY, 4 * ARRAY)


def test_in_place_reads_and_writes_and_a_copy_only_writes_its_target():
    a, b = arrays(2)
    assert count_traffic(lambda: a.add_(b))[1] == Traffic(3 * ARRAY, 3 * ARRAY)
    assert count_traffic(lambda: a.copy_(b))[1] == Traffic(2 * ARRAY, 2 * ARRAY)
    assert count_traffic(lambda: a.zero_())[1] == Traffic(ARRAY, ARRAY)
    assert count_traffic(lambda: torch._foreach_add_([a], [b]))[1].ops == 3 * ARRAY


def test_views_and_allocations_move_nothing_and_expanded_dimensions_count_once():
    a, b = torch.randn(7, SIZE), torch.randn(SIZE)
    assert count_traffic(lambda: a.t()[3:].unsqueeze(0))[1] == Traffic(0, 0)
    # Left behind all the same: nobody reads it here.
    assert count_traffic(lambda: torch.empty(SIZE))[1] == Traffic(0, ARRAY)
    added = count_traffic(lambda: a + b.expand(7, SIZE))[1]
    assert added == Traffic(15 * ARRAY, 15 * ARRAY)


def test_a_table_is_read_where_it_is_looked_up():
    table, rows = torch.randn(1000, 5), torch.tensor([3, 7])
    looked_up = nn.functional.embedding
    traffic = count_traffic(lambda: looked_up(rows, table))[1]
    assert traffic == Traffic(2 * 8 + 2 * 40, 2 * 8 + 2 * 40)


def test_a_tensor_that_is_read_twice_is_twice_asked_for_and_once_needed():
    a, b = arrays(2)
    traffic = count_traffic(lambda: (a + b, a * b))[1]
    assert traffic == Traffic(6 * ARRAY, 4 * ARRAY)


def test_a_phase_ends_where_it_is_taken_and_leaves_what_is_alive():
    a, b = arrays(2)
    with TrafficCounter() as counter:
        kept = a + b
        first = counter.take()
        again = kept * b
        second = counter.take()
    assert first == second == Traffic(3 * ARRAY, 3 * ARRAY)
    assert add_traffic([first, second]) == Traffic(6 * ARRAY, 6 * ARRAY)
    del again


def test_what_a_backward_pass_needs_is_left_by_the_forward_pass():
    weight, x = torch.randn(SIZE, requires_grad=True), torch.randn(SIZE)
    with TrafficCounter() as counter:
        loss = (weight.exp() * x).sum()
        forward = counter.take()
        loss.backward()
        backward = counter.take()
    # Weight and x are read; the exponential stays for the backward pass, and the loss.
    assert forward.least == 3 * ARRAY + 4
    # It reads those two again and leaves the gradient: x, the exponential, the ones of the loss.
    assert 3 * ARRAY <= backward.least <= 3 * ARRAY + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_are_those_of_the_flop_counter(dtype):
    linear, inputs = nn.Linear(7, 5, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    flops, traffic = count_traffic(lambda: linear(inputs))
    assert flops == count_flops(lambda: linear(inputs)) == 2 * 3 * 7 * 5
    assert traffic.ops == dtype.itemsize * (7 * 5 + 5 + 3 * 7 + 3 * 5)
