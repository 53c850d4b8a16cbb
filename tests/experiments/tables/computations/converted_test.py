"""Students of tables: one teacher for all of them, and a student of its own to compare with it."""

import pytest

from experiments.tables.computations import converted

SHORT = (
    *(("steps", 2), ("optimizer.warmup_steps", 0), ("eval.every_steps", 2)),
    *(("checkpoint.every_steps", 2), ("eval.examples", 4)),
)
SMALL = (*SHORT, ("model.width", 8), ("model.depth", 1), ("task.objective", "flow"))


@pytest.mark.full
def test_a_student_that_sees_all_is_its_teacher():
    given = {"seed": 3, "recipe": "diffusion_digits,smoke", "changes": SMALL}
    taught = converted.teacher(**given)
    wide = (*SHORT, ("model.mixers.clear.radius", 9.0), ("optimizer.lr", 1e-12))
    student = converted.student(**given, config="clear", student_changes=wide)
    assert student["test"]["mse"] == pytest.approx(taught["test"]["mse"], rel=1e-5)
    assert student["test"]["to_teacher"] < 1e-12
    assert converted._teacher.cache_info().misses == 1


def test_a_change_of_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="has no option 'nothing'"):
        converted.teacher(seed=0, recipe="diffusion_digits,smoke", changes=(("model.nothing", 1),))
