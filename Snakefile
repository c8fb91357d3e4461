# requant: a mixture-of-experts checkpoint becomes a pruned, quantized, verified, served and measured release.
#
#   snakemake --cores all model_card.md     builds everything in `build` of config.yaml
#   snakemake -n                            says what would run
#   snakemake --cores 1 plan                says what it would take, and how large the releases would be

from snakemake.utils import min_version

min_version("9.27")


configfile: f"{workflow.basedir}/config.yaml"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/source.smk"
include: "rules/calibrate.smk"
include: "rules/reference.smk"
include: "rules/prune.smk"
include: "rules/quantize.smk"
include: "rules/load_test.smk"
include: "rules/pack.smk"
include: "rules/verify.smk"
include: "rules/evaluate.smk"
include: "rules/deploy.smk"
include: "rules/benchmark.smk"
include: "rules/served_benchmark.smk"
include: "rules/publish.smk"
include: "rules/card.smk"
include: "rules/plan.smk"


rule all:
    default_target: True
    input:
        "model_card.md",
