"""README.md of one release."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.card import Figures, load_release, render_release_card
    from requant.provenance import read_provenance
    from requant.records import write_text

    facts = load_release(Path(), **snakemake.params.subject)
    provenance = read_provenance(snakemake.input.provenance).provenance
    loss, hidden_states = [Path(picture).name for picture in snakemake.input.pictures] or (None, None)
    maps = [Path(path).name for path in snakemake.input.saliency]
    figures = Figures(loss, hidden_states, None, {facts.name: maps[0]} if maps else {})
    write_text(snakemake.output.readme, render_release_card(facts, provenance, figures))
