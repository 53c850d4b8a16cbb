"""Text of the Long Range Arena: is a film review, read byte by byte, positive?

Tay et al., "Long Range Arena", ICLR 2021, arXiv 2011.04006; the reviews of IMDB are those of Maas
et al., ACL 2011, as TFDS has them (imdb_reviews). Tokens are those of byte_documents.py, at most
4,095 bytes and the mark: the length of the state-space papers, some of which read characters
instead, without the rare ones.

Departure: a tenth of the 25,000 training reviews is for validation, where the papers have none.
"""

import numpy as np
import tensorflow_datasets as tfds

from experiments.tasks.sources.byte_documents import ANSWER, ask
from experiments.tasks.sources.class_labels import answered_by
from experiments.tasks.sources.tfds_source import prepared, prepared_sha256
from experiments.training.task import Batch, Examples, Length, Task


def make(
    dataset: str = "imdb_reviews",
    length: Length = 4096,
    validation: bool = True,
    data_dir: str = "~/tensorflow_datasets",
    download: bool = False,
    answer: str = "token",
) -> Task:
    """Examples of a text data set; evaluations "validation" and "test".

    dataset     a TFDS data set with a text and a label each and the splits "train" and "test"
    length      T; longer texts are cut
    validation  every tenth training text is validation. False: all are for training, and "test" is
                the only evaluation, by which the papers choose
    data_dir    where TFDS data sets are
    download    lets TFDS download and prepare a data set that is not there yet
    answer      "token": the label is a token of the vocabulary, for a language model; "class": a
                label, for a network with a head of classes

    Accuracy is that of the label. Raises ValueError for a data set that is
    not known, not there or without texts and labels."""
    if length < 2:
        raise ValueError(f"length must be at least 2, a byte and a mark; got {length}")
    builder = prepared(dataset, data_dir, download, choices="")
    features = dict(builder.info.features.items())
    label = features.get("label")
    classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else None
    if not isinstance(features.get("text"), tfds.features.Text) or classes is None:
        raise ValueError(
            f"data set {dataset} must have a 'text' and a class 'label'; its features"
            f" are {features}"
        )

    def examples(split: str, numbers: np.ndarray) -> Examples:
        source = builder.as_data_source(split=split)

        def fetch(indices: np.ndarray) -> Batch:
            rows = source.__getitems__(numbers[indices].tolist())
            return ask([[row["text"]] for row in rows], [row["label"] for row in rows], length)

        return Examples(fetch, len(numbers))

    train, test = (
        np.arange(builder.info.splits[split].num_examples) for split in ("train", "test")
    )
    evaluations = {"test": examples("test", test)}
    if validation:
        held_out = train % 10 == 9
        evaluations = {"validation": examples("train", train[held_out]), **evaluations}
        train = train[~held_out]
    task = Task(
        sizes={"vocabulary": ANSWER + classes},
        train=lambda seed: examples("train", train),
        evaluations=evaluations,
        provenance={
            "texts": builder.info.full_name,
            "train_texts": len(train),
            "texts_sha256": prepared_sha256(builder),
        },
    )
    return answered_by(answer, task, classes)
