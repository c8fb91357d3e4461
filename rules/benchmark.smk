"""
REQUIRED INPUTS   source               {path of the model}/*.safetensors
                  of a pruned model    results/{model}/prune/keep.json
                  the checkpoint       results/{release}/model/*, by its manifest results/{release}/pack.json
                  tasks                files under the benchmark's include_path, and the data files they name
OUTPUTS           source scores        results/reference/{model}/benchmark/{benchmark}.json
                  release scores       results/{release}/benchmark.json: with the recovery against the source
"""


rule benchmark_source:
    input:
        source=all_shards,
        keep=keep_list,
        tokenizer=tokenizer_files,
        tasks=benchmark_files,
    output:
        record="results/reference/{model}/benchmark/{benchmark}.json",
    log:
        "logs/benchmark_source/{model}/{benchmark}.log",
    benchmark:
        "results/benchmarks/benchmark_source/{model}/{benchmark}.tsv"
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=memory_of("benchmark_source"),
        runtime=run_time_of("benchmark_source"),
    params:
        *code_and_libraries("benchmark_source"),
        source=source_path_of,
        settings=benchmark_config,
        tasks=benchmark_folder,
        device=device,
    script:
        "../scripts/benchmark_source.py"


rule benchmark:
    input:
        packed=packed_files,
        source_scores=source_scores,
        tasks=benchmark_files,
    output:
        record="results/{release}/benchmark.json",
    log:
        "logs/benchmark/{release}.log",
    benchmark:
        "results/benchmarks/benchmark/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=memory_of("benchmark"),
        runtime=run_time_of("benchmark"),
    params:
        *code_and_libraries("benchmark"),
        benchmark=benchmark_of,
        settings=benchmark_config,
        tasks=benchmark_folder,
        device=device,
    script:
        "../scripts/benchmark.py"
