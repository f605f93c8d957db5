"""Settings of the data sources: the task and the files of its rows."""

import dataclasses


@dataclasses.dataclass
class FilesConfig:
    """Files and columns of a user's own data (task "files").

    Attributes:
        train, dev, test: paths (.csv, .tsv, .jsonl, .json, .parquet), relative to `data_dir`.
        text, text_pair, label: column names; `text_pair` is empty for single texts, and `label`
            may be empty for the strategy "attach": the rows then have no labels.
        regression: the labels are scores, not classes.
        skip_bad_rows: leave out the rows that cannot be read or have an empty text or label.
            Otherwise, such a row is an error.
    """

    train: str = ""
    dev: str = ""
    test: str = ""
    text: str = "text"
    text_pair: str = ""
    label: str = "label"
    regression: bool = False
    skip_bad_rows: bool = False


@dataclasses.dataclass
class DataConfig:
    """The task and the source of its rows.

    Attributes:
        task: "demo", "files" or the name of a GLUE task.
        data_dir: for a GLUE task, the folder of GLUE's original TSV files; if empty, the
            `datasets` library downloads the task from the Hugging Face hub. For task "files", the
            folder that the paths in `files` are relative to.
        files: see `FilesConfig`.
        label_names: the classes of the task in the order of the classifier's outputs, separated by
            commas. A classifier that names its outputs itself needs no `label_names`.
    """

    task: str = ""
    data_dir: str = ""
    files: FilesConfig = dataclasses.field(default_factory=FilesConfig)
    label_names: str = ""
