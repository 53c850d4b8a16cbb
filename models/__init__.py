"""Flax (nnx) models over the recurrences of `ops`: one file per system, found by file name.

Parameters carry metadata for the trainer. `out_sharding` holds one logical axis name (or None) per
dimension: `layers` (blocks stacked by the layer scan), `vocabulary`, `embed` (model width), `heads`
(heads times their size, or independent channels), `mlp` (inner width). `group` ("ssm" or
"no_decay") names an optimizer group where the default does not fit."""

import flax

# Logical axis names are metadata here: the trainer turns them into shardings in a jitted
# initialisation. Placed eagerly, at creation, they would demand a mesh, and a model could not be
# built without one.
flax.config.update("flax_always_shard_variable", False)
