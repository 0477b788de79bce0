"""Files and batches that cannot be had, or not any more."""

from __future__ import annotations

from fabric.errors.admission import AdmissionError


class FilesFull(AdmissionError):
    """A project's files take as much room as they may."""

    code = "files_full"
    http_status = 413

    def __init__(self, *, num_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"The project's files may take {limit_bytes} bytes together and would take {num_bytes};"
            " delete some, or wait until they expire.",
            num_bytes=num_bytes,
            limit_bytes=limit_bytes,
        )


class FileInUse(AdmissionError):
    """A file is deleted that a batch is reading."""

    code = "file_in_use"
    http_status = 409

    def __init__(self, *, file: str, batch: str) -> None:
        super().__init__(
            f"The file {file!r} is the input of the batch {batch!r}, which is not over; cancel that"
            " one, or wait for its end.",
            file=file,
            batch=batch,
        )


class BatchOver(AdmissionError):
    """What has ended cannot be cancelled."""

    code = "batch_over"
    http_status = 409

    def __init__(self, *, batch: str, status: str) -> None:
        super().__init__(
            f"The batch {batch!r} is {status} and cannot be cancelled; its results are in its"
            " output file.",
            batch=batch,
            status=status,
        )
