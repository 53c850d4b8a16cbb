"""Retrieval of the Long Range Arena: are two papers linked by a citation?

Tay et al., "Long Range Arena", ICLR 2021, arXiv 2011.04006; the papers are those of the ACL
Anthology Network (Radev et al., 2013), two to an example, read byte by byte. Tokens are those of
byte_documents.py:

    first paper, mark, second paper, mark, padding

A paper with its mark has at most `length` tokens. With answer="token" both papers are one sequence,
and the answer is a token that is asked for at its end, so that a causal model compares while it
reads the second paper. With answer="class" it is as in the benchmark: the same weights encode each
paper, which are the two halves of a row, and a head compares two vectors."""

from collections.abc import Sequence

import numpy as np

from experiments.objectives.classification import Classification
from experiments.objectives.next_token import NextToken
from experiments.tasks.sources.byte_documents import ANSWER, ask
from experiments.tasks.sources.class_labels import ANSWERS
from experiments.tasks.sources.lra_release import open_table, released
from experiments.training.task import Batch, Examples, Length, Task
from models.parts.options import check_choice

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
COLUMNS = ("label", "id1", "id2", "text1", "text2")


def make(
    data_dir: str = "~/lra_release/lra_release/tsv_data",
    length: Length = 4000,
    answer: str = "token",
) -> Task:
    """Evaluations "validation" and "test", as released; T is twice the length.

    data_dir    the directory with new_aan_pairs.train.tsv, .eval.tsv and .test.tsv of the release
                (lra_release.py), of 147,086, 18,090 and 17,437 pairs
    length      of a document with its mark; longer ones are cut
    answer      "token", for a language model, or "class", for a network that compares two documents

    The files are read through once at the start, which takes a minute or so, and then line by line.
    Guessing has accuracy 0.5. Raises ValueError for files that are missing
    or damaged."""
    if length < 2:
        raise ValueError(f"length must be at least 2, a byte and a mark; got {length}")
    directory = released(data_dir, "tsv_data", tuple(FILES.values()))
    tables = {
        split: open_table(directory / name, COLUMNS, label="label", classes=2, header=False)
        for split, name in FILES.items()
    }

    check_choice("answer", answer, ANSWERS)

    def halves(documents: Sequence[Sequence[bytes]], labels: Sequence[int]) -> Batch:
        both = [ask([[pair[i]] for pair in documents], labels, length) for i in range(2)]
        place_T = np.arange(length)[None]
        return {
            "tokens": np.concatenate([half["tokens"] for half in both], axis=1),
            "mask": np.concatenate([place_T <= half["readout_positions"] for half in both], axis=1),
            "labels": np.array(labels, np.int32),
            "weights": np.ones(len(labels), np.float32),
        }

    def examples(split: str) -> Examples:
        table = tables[split]

        def fetch(indices: np.ndarray) -> Batch:
            documents = [row[3:] for row in table.rows(indices)]
            labels = table.labels[indices].tolist()
            return (
                ask(documents, labels, length) if answer == "token" else halves(documents, labels)
            )

        return Examples(fetch, len(table.labels))

    return Task(
        sizes={"vocabulary": ANSWER + 2}
        if answer == "token"
        else {"vocabulary": ANSWER, "classes": 2, "documents": 2},
        objective=NextToken() if answer == "token" else Classification(),
        train=lambda seed: examples("train"),
        evaluations={split: examples(split) for split in ("validation", "test")},
        provenance={
            "pairs": f"files of {directory.name}",
            "train_pairs": len(tables["train"].labels),
            **{f"{table.path.name}_sha256": table.sha256 for table in tables.values()},
        },
    )
