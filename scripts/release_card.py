"""README.md and provenance.json of one release."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.card import Figures, load_release, render_release_card
    from requant.provenance import collect, git_commit
    from requant.records import write_json, write_text

    facts = load_release(Path(), **snakemake.params.subject)
    commit = git_commit(Path(snakemake.scriptdir).parent)
    pruning = (facts.pruning.keep, facts.pruning.calibration) if facts.pruning else ()
    provenance = collect(facts.source, facts.calibration, facts.blocks, facts.pack, facts.base_model, commit, *pruning)
    loss, hidden_states = [Path(picture).name for picture in snakemake.input.pictures] or (None, None)
    maps = [Path(path).name for path in snakemake.input.saliency]
    figures = Figures(loss, hidden_states, None, {facts.name: maps[0]} if maps else {})
    write_text(snakemake.output.readme, render_release_card(facts, provenance, figures))
    write_json(snakemake.output.provenance, provenance)
