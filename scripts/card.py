"""model_card.md: the card of the build."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.card import Figures, load_release, render_card
    from requant.provenance import read_provenance
    from requant.records import write_text

    releases = [load_release(Path(), **subject) for subject in snakemake.params.subjects]
    provenance = [read_provenance(path).provenance for path in snakemake.input.provenance]
    loss, hidden_states = snakemake.input.pictures or (None, None)
    experts = snakemake.input.experts
    saliency = {Path(path).parts[-3]: path for path in snakemake.input.saliency}
    figures = Figures(loss, hidden_states, experts[0] if experts else None, saliency)
    write_text(snakemake.output.card, render_card(releases, provenance, figures))
