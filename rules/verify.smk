"""
REQUIRED INPUTS   the checkpoint       results/{release}/model/*, by its manifest results/{release}/pack.json
                  source               {path of the model}/*.safetensors
                  of a pruned model    results/{model}/prune/keep.json
OUTPUTS           every tensor's check results/{release}/verify.json
"""


rule verify:
    input:
        packed=packed_files,
        keep=keep_list,
        source=all_shards,
    output:
        record="results/{release}/verify.json",
    log:
        "logs/verify/{release}.log",
    benchmark:
        "results/benchmarks/verify/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("verify"),
        runtime=run_time_of("verify"),
    params:
        *code_and_libraries("verify"),
        source=source_path_of,
        limits=limits_of,
        samples=verify_samples,
    script:
        "../scripts/verify.py"
