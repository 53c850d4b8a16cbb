"""A ratchet keeps numbers by compiler and program."""

from experiments.benchmarks import ratchet


def test_numbers_of_a_program_take_the_place_of_those_that_were_there(tmp_path):
    path = tmp_path / "ratchet.json"
    assert ratchet.recorded(path, "1.0") is None
    ratchet.record(path, "1.0", "p", {"cycles": 3})
    ratchet.record(path, "1.0", "q", {"cycles": 4})
    ratchet.record(path, "1.0", "p", {"cycles": 2})
    assert ratchet.recorded(path, "1.0") == {"p": {"cycles": 2}, "q": {"cycles": 4}}
    assert ratchet.recorded(path, "2.0") is None
