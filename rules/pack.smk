"""
REQUIRED INPUTS   packed blocks        results/{release}/blocks/{block}.safetensors, {block}.json
                  source               {path of the model}/*
                  of a pruned model    results/{model}/prune/keep.json
OUTPUTS           the checkpoint       results/{release}/model/*: shards are hard links of the block files
                  its manifest         results/{release}/pack.json: every file with size and sha256, and the counts
"""


rule pack:
    input:
        blocks=block_files,
        records=block_records,
        keep=keep_list,
        source=all_shards,
        beside=carried_files,
    output:
        config="results/{release}/model/config.json",
        index="results/{release}/model/model.safetensors.index.json",
        record="results/{release}/pack.json",
    log:
        "logs/pack/{release}.log",
    benchmark:
        "results/benchmarks/pack/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("pack"),
        runtime=run_time_of("pack"),
    params:
        *code_and_libraries("pack"),
        source=source_path_of,
        model=model_of,
        scheme=scheme_of_release,
        mtp=mtp_of_release,
        carried=carried_names,
    script:
        "../scripts/pack.py"
