"""The random numbers of an epoch: drawn from its seed, saved and taken up again on its device."""

import pytest
import torch

from dnal_mini.training.position import Position, generator_states, own_randomness


class Gpus:
    """The generators of two GPUs, of which the first is torch's current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = [torch.tensor([1, 1]), torch.tensor([2, 2])]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def get(self, device: object = "cuda") -> torch.Tensor:
        return self.states[torch.device(device).index or 0].clone()

    def set(self, state: torch.Tensor, device: object = "cuda") -> None:
        self.states[torch.device(device).index or 0] = state.clone()


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 0)])
def test_the_state_that_is_saved_is_that_of_the_gpu_in_use(device, index, monkeypatch):
    gpus, device = Gpus(monkeypatch), torch.device(device)
    with own_randomness(device, "x", 1, None, None) as draw:
        gpus.states[index] = torch.tensor([7, 7])  # as if something had been drawn there
        states = generator_states(device, None)
        place = Position(1, 5, 0.0, torch.zeros(9, 3), draw.get_state(), states)
    assert [state.tolist() for state in gpus.states] == [[1, 1], [2, 2]]  # the caller's
    with own_randomness(device, "x", 1, None, place):
        assert gpus.states[index].tolist() == [7, 7]
        assert gpus.states[1 - index].tolist() == [2 - index] * 2  # the other is left alone


def test_on_the_cpu_no_gpu_is_asked(monkeypatch):
    def asked(*_: object) -> None:
        raise AssertionError("a GPU was asked")

    Gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked)
    (states,) = generator_states(torch.device("cpu"), None)
    assert len(states) == 1
    assert torch.equal(states[0], torch.get_rng_state())
