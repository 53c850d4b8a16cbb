"""What `bench --tpu_aot` compiles, one file per op."""
