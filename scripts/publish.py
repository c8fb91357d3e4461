"""Uploads finished releases to the hub, or says what it would upload: `snakemake --cores 1 publish`."""

from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.publishing import HOW_TO_UPLOAD, Subject, announcement, check_token, passed, publish, shown

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    subjects = [Subject(**found) for found in snakemake.params.subjects]
    releases = [(subject, passed(subject)) for subject in subjects]
    for subject, files in releases:
        progress(announcement(subject, files))
    if not snakemake.params.upload:
        progress(f"nothing was uploaded; to upload: {HOW_TO_UPLOAD}")
    else:
        check_token()
        for subject, files in releases:
            record = publish(subject, files)
            progress(
                f"{record.release}: {record.repository} has its {len(record.files)} files, {shown(record.bytes)}, "
                f"at {record.commit}: {subject.record}"
            )
