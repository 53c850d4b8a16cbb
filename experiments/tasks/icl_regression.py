"""In-context linear regression: a prompt of labelled examples and a query, a fresh task in every
prompt.

Garg, Tsipras, Liang, Valiant, "What Can Transformers Learn In-Context?", NeurIPS 2022, arXiv
2208.01066; covariances and shifts after Zhang, Frei, Bartlett, "Trained Transformers Learn Linear
Models In-Context", JMLR 2024, arXiv 2306.09927.

    x_1 .. x_N, x_q ~ N(0, Lam) in R^d,    w ~ N(0, Psi),    y_i = w^T x_i + s xi_i,  xi_i ~ N(0, 1)

    examples [N+1, d+1]     rows (x_1, y_1) .. (x_N, y_N), (x_q, 0)
    target []               w^T x_q, without noise: the loss is the excess risk of
                            experiments/tables/computations/icl_closed_form.py
"""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from experiments.objectives.squared_error import SquaredError
from experiments.tasks.sources.random_streams import normals, uniforms
from experiments.training.memory import check_held
from experiments.training.task import Batch, Examples, Length, Task
from models.parts.options import Factor, Range, Weight

Dimension = Annotated[int, Range(1, 4096)]
Eigenvalue = Annotated[float, Range(1e-12, 1e12)]


@dataclass(frozen=True)
class Prompts:
    """A law of prompts. `covariance` None: eigenvalues Exp(1), drawn anew for every prompt."""

    examples: int
    covariance: tuple[float, ...] | None
    query_covariance: tuple[float, ...] | None
    task_covariance: tuple[float, ...]
    noise: float
    input_scale: float = 1.0


def make(
    dimension: Dimension = 5,
    examples: Length = 20,
    covariance: tuple[Eigenvalue, ...] = (),
    exponential_covariance: bool = False,
    task_covariance: tuple[Eigenvalue, ...] = (),
    noise: Weight = 0.0,
    test_lengths: tuple[Length, ...] = (),
    test_input_scales: tuple[Factor, ...] = (),
    test_reversed: bool = False,
) -> Task:
    """Fresh prompts for training; evaluations "in_distribution" and the shifts that are asked for.

    dimension               d
    examples                N, labelled examples per prompt in training
    covariance              the d eigenvalues of Lam; (): all 1
    exponential_covariance  every prompt has a diagonal Lam of its own, with independent Exp(1)
                            entries
    task_covariance         the d eigenvalues of Psi; (): all 1
    noise                   s, the standard deviation of the label noise
    test_lengths            "length_<M>": M labelled examples
    test_input_scales       "scale_<kappa>": context and query multiplied by kappa, labels those of
                            the scaled inputs
    test_reversed           "reversed": the eigenvalues in reverse order; "reversed_query": for the
                            query alone

    Metrics: loss (risk) and normalised_loss (risk over that of the prediction 0).
    """
    if exponential_covariance and (covariance or test_reversed):
        raise ValueError(
            "exponential_covariance=True excludes covariance and test_reversed, which"
            " need one fixed Lam"
        )
    eigenvalues = (
        None if exponential_covariance else _eigenvalues("covariance", covariance, dimension)
    )
    training = Prompts(
        examples=examples,
        covariance=eigenvalues,
        query_covariance=eigenvalues,
        task_covariance=_eigenvalues("task_covariance", task_covariance, dimension),
        noise=noise,
    )
    laws = {"in_distribution": training}
    laws |= {f"length_{length}": replace(training, examples=length) for length in test_lengths}
    laws |= {
        f"scale_{scale:g}": replace(training, input_scale=scale) for scale in test_input_scales
    }
    if test_reversed and eigenvalues is not None:
        backwards = eigenvalues[::-1]
        laws["reversed"] = replace(training, covariance=backwards, query_covariance=backwards)
        laws["reversed_query"] = replace(training, query_covariance=backwards)

    def stream(name: str, law: Prompts) -> Examples:
        count = numbers_per_prompt(law, dimension)
        check_held(
            "a prompt of config.task.dimension and examples (or test_lengths)", 4 * 8 * count
        )
        return Examples(
            lambda indices: draw_prompts(
                uniforms(f"icl/{law}/{name}", indices, count), law, dimension
            )
        )

    return Task(
        sizes={},
        train=lambda seed: stream(f"train/{seed}", training),
        evaluations={name: stream("test", law) for name, law in laws.items()},
        objective=SquaredError(),
    )


def numbers_per_prompt(law: Prompts, dimension: int) -> int:
    """Uniform numbers for inputs, task and noise (an even number of normal ones), and for Exp(1)
    eigenvalues."""
    normal = (law.examples + 1) * dimension + dimension + (law.examples if law.noise else 0)
    return normal + normal % 2 + (dimension if law.covariance is None else 0)


def draw_prompts(uniform: np.ndarray, law: Prompts, dimension: int) -> Batch:
    """Prompts from uniform numbers [n, numbers_per_prompt]."""
    count, n = law.examples, len(uniform)
    if law.covariance is None:
        context_nD = query_nD = -np.log1p(-uniform[:, -dimension:])
        uniform = uniform[:, :-dimension]
    else:
        context_nD, query_nD = (np.array([law.covariance]), np.array([law.query_covariance]))
    sizes = [(count + 1) * dimension, dimension, count if law.noise else 0]
    x, w, xi, _ = np.split(normals(uniform), np.cumsum(sizes), axis=1)
    variance_nMD = np.concatenate(
        [np.repeat(context_nD[:, None], count, axis=1), query_nD[:, None]], axis=1
    )
    scale_nMD = (law.input_scale * np.sqrt(variance_nMD)).astype(np.float32)
    x_nMD = x.reshape(n, count + 1, dimension) * scale_nMD
    w_nD = w * np.sqrt(law.task_covariance).astype(np.float32)
    label_nM = np.einsum("nmd,nd->nm", x_nMD, w_nD)
    target_n = label_nM[:, -1].copy()
    if law.noise:
        label_nM[:, :-1] += np.float32(law.noise) * xi
    label_nM[:, -1] = 0
    return {
        "examples": np.concatenate([x_nMD, label_nM[:, :, None]], axis=2),
        "target": target_n,
        "weights": np.ones(n, np.float32),
    }


def _eigenvalues(name: str, value: tuple[float, ...], dimension: int) -> tuple[float, ...]:
    if not value:
        return (1.0,) * dimension
    if len(value) != dimension:
        raise ValueError(
            f"{name} must be {dimension} positive eigenvalues, as many as dimension, or"
            f" (); got {value!r}"
        )
    return tuple(value)
