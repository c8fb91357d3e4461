"""
REQUIRED INPUTS   saliencies           results/reference/{source}/{calibration}/saliency_{block}.csv
                  or, sequential       tokens, the pruned model's own chain, and shards of the block
                  to measure it        the source's reference chain, held-out tokens, {path of the source}/*
OUTPUTS           kept experts         results/{model}/prune/keep.json
                  pruned and original  results/{model}/prune/evaluate.json: KL, agreement, perplexity
MEANWHILE         sequential mode      results/{model}/prune/saliency_{block}.csv, keep_{block}.json

{model} is pruned, {source} the model that it is pruned from. In one shot, all blocks of the source are observed by its
reference chain, and every ratio and method shares that. In sequence, a block is observed on the output of the pruned
blocks before it: `observe`, `keep_block` and the pruned model's `reference` take turns.
"""


rule observe:
    input:
        tokens=observed_tokens,
        hidden=pruned_before,
        shards=block_shards,
    output:
        saliency="results/{model}/prune/saliency_{block}.csv",
    log:
        "logs/observe/{model}/{block}.log",
    benchmark:
        "results/benchmarks/observe/{model}/{block}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        gpu=gpus,
        mem_mb=memory_of("observe"),
        runtime=run_time_of("observe"),
    params:
        *code_and_libraries("observe"),
        source=source_path_of,
        device=device,
    script:
        "../scripts/observe.py"


rule keep_block:
    input:
        saliency="results/{model}/prune/saliency_{block}.csv",
    output:
        keep="results/{model}/prune/keep_{block}.json",
    log:
        "logs/keep_block/{model}/{block}.log",
    benchmark:
        "results/benchmarks/keep_block/{model}/{block}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("keep_block"),
        runtime=run_time_of("keep_block"),
    params:
        *code_and_libraries("keep_block"),
        pruning=pruning_of,
    script:
        "../scripts/keep_block.py"


rule keep:
    input:
        saliency=saliency_tables,
    output:
        keep="results/{model}/prune/keep.json",
    log:
        "logs/keep/{model}.log",
    benchmark:
        "results/benchmarks/keep/{model}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("keep"),
        runtime=run_time_of("keep"),
    params:
        *code_and_libraries("keep"),
        pruning=pruning_of,
    script:
        "../scripts/keep.py"


rule prune_evaluate:
    input:
        tokens=observed_tokens,
        calibration=observed_record,
        hidden=original_chain,
        keep=keep_list,
        source=all_shards,
    output:
        record="results/{model}/prune/evaluate.json",
    log:
        "logs/prune_evaluate/{model}.log",
    benchmark:
        "results/benchmarks/prune_evaluate/{model}.tsv"
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=memory_of("prune_evaluate"),
        runtime=run_time_of("prune_evaluate"),
    params:
        *code_and_libraries("prune_evaluate"),
        source=source_path_of,
        device=device,
    script:
        "../scripts/prune_evaluate.py"
