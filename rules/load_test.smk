"""
REQUIRED INPUTS   the first blocks     results/{release}/blocks/{block}.safetensors, {block}.json
                  embeddings, head     the shards of {path of the model} that hold them, and its tokenizer
                  held-out tokens      results/calibration/{source}/{calibration}/tokens.safetensors
                  of a pruned model    results/{model}/prune/keep.json (or keep_{block}.json)
OUTPUTS           what was served      results/{release}/load_test.json: command, answers, and whose tokens they are
MEANWHILE         the cut checkpoint   results/{release}/load_test/: gone when the job ends, emptied when it starts
                  of a failed test     results/{release}/load_test.failed: ends further blocks of this release; gone
                                       when a build starts
"""


rule load_test:
    input:
        blocks=first_blocks,
        records=first_records,
        keep=keep_list_of_first,
        source=outer_shards,
        tokenizer=tokenizer_files,
        tokens=tokens_of,
    output:
        record="results/{release}/load_test.json",
    log:
        job="logs/load_test/{release}.log",
        engine="logs/load_test/{release}.engine.log",
    benchmark:
        "results/benchmarks/load_test/{release}.tsv"
    priority: 3
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=serving_gpus,
        mem_mb=memory_of("load_test"),
        runtime=run_time_of("load_test"),
    params:
        *code_and_libraries("load_test"),
        source=source_path_of,
        scheme=scheme_of_release,
        settings=deploy_config,
        target=target_config,
    script:
        "../scripts/load_test.py"
