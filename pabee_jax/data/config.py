"""Which data to read: the settings of every data source."""

import dataclasses


@dataclasses.dataclass
class FilesConfig:
    """A user's own files (task "files").

    Attributes:
        train, dev, test: paths (.csv, .tsv, .jsonl, .json, .parquet), relative to `data_dir`.
        text, text_pair, label: column names; `text_pair` empty for single texts.
        regression: the label is a score, not a class.
    """

    train: str = ""
    dev: str = ""
    test: str = ""
    text: str = "text"
    text_pair: str = ""
    label: str = "label"
    regression: bool = False


@dataclasses.dataclass
class DataConfig:
    """The task and the place of its rows.

    Attributes:
        task: "demo", "files" or one of GLUE's nine.
        data_dir: folder of GLUE's original TSV files; empty: from the hub through `datasets`. For
            task "files", the folder that the paths in `files` are relative to.
        files: see `FilesConfig`.
    """

    task: str = ""
    data_dir: str = ""
    files: FilesConfig = dataclasses.field(default_factory=FilesConfig)
