"""
REQUIRED INPUTS   records of a release    results/{release}/pack.json, results/{release}/blocks/{block}.json
                  records it shares       results/source/{model}/source.json,
                                          results/calibration/{model}/{calibration}/calibration.json
                  of a pruned model       results/{model}/prune/keep.json
                  tasks                   files under the benchmark's include_path, and the data files they name; the
                                          published files of benchmarks of the served model, under their `data`
                  the environment         envs/*.lock, flake.lock
                  scores                  results/{release}/benchmark.json (for benchmarks of the hub)
                  card and pictures       results/{release}/model/README.md, *.png
                  a key                   publish.signing_key of the config, if there is one
OUTPUTS           provenance              results/{release}/model/provenance.json
                  what is installed       results/{release}/model/sbom.cdx.json
                  scores for the hub      results/{release}/model/.eval_results/requant.yaml (for benchmarks of the hub)
                  hashes                  results/{release}/model/SHA256SUMS: of every other file but the signature
                  signature               results/{release}/model/model.sig (if the config names a key)
                  what was uploaded       results/{release}/publish.json, by `snakemake --cores 1 publish` alone

The rule `publish` builds nothing: it is no part of a build, and a release that is not finished is refused. Without
`--config upload=true` it says what would be uploaded.
"""


rule provenance:
    input:
        pack="results/{release}/pack.json",
        blocks=block_records,
        source=source_of_release,
        calibration=calibration_record,
        keep=keep_list,
        observed=tokens_observed,
        tasks=benchmark_files,
        published=published_of,
    output:
        provenance="results/{release}/model/provenance.json",
    log:
        "logs/provenance/{release}.log",
    benchmark:
        "results/benchmarks/provenance/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("provenance"),
        runtime=run_time_of("provenance"),
    params:
        *code_and_libraries("provenance"),
        locks=environment_locks(),
        config=config_alone,
        base_model=base_model_of,
        benchmark=benchmark_of,
        task_folder=benchmark_folder,
        published=published_folders,
    script:
        "../scripts/provenance.py"


rule sbom:
    output:
        sbom="results/{release}/model/sbom.cdx.json",
    log:
        "logs/sbom/{release}.log",
    benchmark:
        "results/benchmarks/sbom/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("sbom"),
        runtime=run_time_of("sbom"),
    params:
        *code_and_libraries("sbom"),
        locks=environment_locks(),
    script:
        "../scripts/sbom.py"


rule eval_results:
    input:
        record="results/{release}/benchmark.json",
    output:
        results="results/{release}/model/.eval_results/requant.yaml",
    log:
        "logs/eval_results/{release}.log",
    benchmark:
        "results/benchmarks/eval_results/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("eval_results"),
        runtime=run_time_of("eval_results"),
    params:
        *code_and_libraries("eval_results"),
        tasks=hub_tasks,
    script:
        "../scripts/eval_results.py"


rule checksums:
    input:
        pack="results/{release}/pack.json",
        files=files_beside,
    output:
        sums="results/{release}/model/SHA256SUMS",
    log:
        "logs/checksums/{release}.log",
    benchmark:
        "results/benchmarks/checksums/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("checksums"),
        runtime=run_time_of("checksums"),
    params:
        *code_and_libraries("checksums"),
    script:
        "../scripts/checksums.py"


rule sign:
    input:
        sums="results/{release}/model/SHA256SUMS",
    output:
        signature="results/{release}/model/model.sig",
    log:
        "logs/sign/{release}.log",
    benchmark:
        "results/benchmarks/sign/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("sign"),
        runtime=run_time_of("sign"),
    params:
        *code_and_libraries("sign"),
        key=signing_key,
    script:
        "../scripts/sign.py"


localrules:
    publish,


rule publish:
    log:
        "logs/publish.log",
    conda:
        "../envs/requant.yaml"
    params:
        subjects=publish_subjects,
        upload=upload_wanted,
    script:
        "../scripts/publish.py"
