"""
REQUIRED INPUTS   what a model is      locks/{model}.json, or {path of the model}/*.safetensors (headers), or
                                       {path of the model}/config.json alone
                  finished jobs        results/*/blocks/*.json and other records, where there are any
OUTPUTS           a plan a release     results/{release}/plan.json, and one table of all of them

`snakemake --cores 1 plan` is made anew each time it is asked for: finished jobs and free disk change by themselves.
It builds and hashes nothing.
"""


localrules:
    plan,


rule plan:
    log:
        "logs/plan.log",
    conda:
        "../envs/requant.yaml"
    params:
        subjects=plan_subjects,
        files=rates_asked_for,
        rates=str(Path(workflow.basedir) / "benchmarks/results/rates.json"),
    script:
        "../scripts/plan.py"
