"""What is read of a kernel's final bundles."""

from experiments.benchmarks import tpu_bundles

DUMP = """== CAPACITY:
MXU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL
    2     3     3     2     2
== UTILIZATION:
1 3 2 0 0
2 0 0 1 1
"""


def test_spills_and_occupancy_are_those_of_the_last_dump_of_each_kernel(tmp_path):
    for name, text in {
        "10-f.1-01-final_hlo-static-per-bundle-utilization.txt": DUMP + "0 3 3 0 0\n",
        "11-f.1-00-pre-delay_hlo-static-per-bundle-utilization.txt": DUMP,
        "12-f.1-01-final_hlo-static-per-bundle-utilization.txt": DUMP,
        "13-g.2-01-final_hlo-static-per-bundle-utilization.txt": DUMP + "1 1 0 1 1\n",
        "14-fusion-01-final_hlo-static-per-bundle-utilization.txt": DUMP,
    }.items():
        (tmp_path / name).write_text(text)
    hlo = """
      %f.1 = (f32[8]) custom-call(%x), custom_call_target="tpu_custom_call"
      %fusion = f32[8] fusion(%f.1)
      g.2 = f32[8] custom-call(%fusion), custom_call_target="tpu_custom_call"
    """
    kernels = tpu_bundles.kernel_names(hlo)
    assert kernels == ["f.1", "g.2"]
    assert tpu_bundles.use(str(tmp_path), kernels) == {
        "bundles": 5,
        "full": 0.8,
        "spills": 7,
        "occupancy": {"MXU": 0.7, "VLOAD": 0.467, "VSTORE": 0.3},
    }
